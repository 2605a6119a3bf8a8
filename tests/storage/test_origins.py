"""A run goes on wherever its data and its teacher lie, to the same bits, and with nothing but them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.data.dataset import SAMPLED, Dataset, Split
from shoal.data.loading import load
from shoal.errors import ShoalError
from shoal.networks.stored import load_network, save_network
from shoal.storage.origins import began, difference, placed
from shoal.storage.run import Run
from tests.cli.test_commands import call
from tests.conftest import blobs
from tests.support.layouts import write_cifar, write_folder
from tests.support.sharded import same
from tests.support.tables import fast_where

# ---------------------------------------------------------------- fingerprints of data


def changed(data: Dataset, part: str, **fields: torch.Tensor) -> Dataset:
    return replace(data, **{part: replace(getattr(data, part), **fields)})


def test_a_fingerprint_is_of_what_is_in_a_set() -> None:
    data = blobs(64)
    own = data.fingerprint()
    assert own == replace(data, name="other/place").fingerprint() == blobs(64).fingerprint()
    assert own != replace(data, name="cifar10").fingerprint()
    assert own != replace(data, classes=5).fingerprint()
    for part in ("train", "val", "test"):
        split: Split = getattr(data, part)
        for i in (0, 17, len(split) - 1):
            labels, images = split.labels.clone(), split.images.clone()
            labels[i] = (labels[i] + 1) % 4
            images[i, 0, 3, 3] ^= 1
            assert changed(data, part, labels=labels).fingerprint() != own
            assert changed(data, part, images=images).fingerprint() != own
        assert replace(data, **{part: split.take(range(len(split) - 1))}).fingerprint() != own


def test_a_large_sets_labels_count_all_and_its_images_by_a_sample() -> None:
    data, own = blobs(3 * SAMPLED), blobs(3 * SAMPLED).fingerprint()
    images = data.train.images.clone()
    images[-1] = 0
    assert changed(data, "train", images=images).fingerprint() != own
    for i in range(0, 3 * SAMPLED, 501):
        labels = data.train.labels.clone()
        labels[i] ^= 1
        assert changed(data, "train", labels=labels).fingerprint() != own


def test_last_bits_of_points_are_no_difference() -> None:
    points = Split(torch.randint(-1000, 1000, (20, 3, 32, 1)) / 1000, torch.arange(20) % 10)
    data = Dataset("modelnet10", points, points, points, 10, (0.0,) * 3, (1.0,) * 3, "none")
    nudged = Split(torch.nextafter(points.images, torch.full((), 2.0)), points.labels)
    moved = Split(points.images + 0.01, points.labels)
    assert replace(data, train=nudged).fingerprint() == data.fingerprint() != replace(data, train=moved).fingerprint()


def test_a_folder_is_the_same_by_path_and_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = [load(str(tmp_path / "a")), load(str(tmp_path / "b")), load("folder", tmp_path / "b")]
    assert len({data.fingerprint() for data in found}) == 1
    shutil.copy(tmp_path / "b/train/cat/0.png", tmp_path / "b/train/dog/0.png")
    assert load("folder", tmp_path / "b").fingerprint() != found[0].fingerprint()


def test_places_and_settings_are_told_apart() -> None:
    old: dict[str, Any] = {"data": "cifar10", "data_dir": "a", "seed": 0, "teacher": "t", "fingerprints": {"data": "x"}}
    assert difference(old, old | {"data_dir": None, "teacher": "u", "fingerprints": {}}) is None
    assert difference(old, {k: v for k, v in old.items() if k != "data_dir"}) is None
    assert difference(old | {"data": "/here/flowers"}, old | {"data": "folder"}) is None
    for name, value in (("data", "cifar100"), ("data", "/flowers"), ("seed", 1), ("teacher", None), ("plan", "p")):
        assert difference(old, old | {name: value}) == name
    assert placed({"data": "/flowers", "data_dir": None}, Path("b")) == {"data": "folder", "data_dir": Path("b")}
    assert placed(old, Path("b"))["data"] == "cifar10"
    assert placed(old, None) == old


# ---------------------------------------------------------------- a run that moves

SMALL = ("resnet10", "--width", "0.125", "--epochs", "2", "--json")


class Place:
    """Data, a teacher's run and a reduction, each in a folder that `move` gives another name."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.moves = root, 0
        shutil.copytree(data, self.data)

    data = property(lambda self: self.root / f"data{self.moves}")
    teacher = property(lambda self: self.root / f"at{self.moves}" / "teacher")
    reduced = property(lambda self: self.root / f"reduced{self.moves}")

    def move(self) -> None:
        old = self.data, self.teacher, self.reduced
        self.moves += 1
        for before, after in zip(old, (self.data, self.teacher, self.reduced), strict=True):
            if before.exists():
                after.parent.mkdir(parents=True, exist_ok=True)
                before.rename(after)

    def train(self, *more: str) -> Any:
        words = ("train", *SMALL, "--data", "cifar10", "--data-dir", str(self.data), "--out", str(self.teacher))
        return json.loads(call(*words, *more))

    def reduce(self, *more: str) -> Any:
        words = ("reduce", str(self.teacher), "--budget", "3000", "--d-th", "0.12", "--epochs", "1,1,3", "--json")
        return json.loads(call(*words, "--data-dir", str(self.data), "--out", str(self.reduced), *more))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_cifar(root, "cifar10")
    return root


@pytest.mark.usefixtures("epochwise")
@pytest.mark.slow
def test_a_run_that_moves_with_all_it_needs_ends_with_the_same_bits(cifar: Path, tmp_path: Path) -> None:
    whole, parts = Place(tmp_path / "whole", cifar), Place(tmp_path / "parts", cifar)
    whole.train()
    summary = whole.reduce()
    with pytest.raises(ShoalError, match="time is up"):
        parts.train("--max-seconds", "0")
    parts.move()
    parts.train("--resume", "--shard-mb", "0.07")
    for epoch in range(4):
        with pytest.raises(ShoalError, match="time is up"):
            parts.reduce("--max-seconds", "0", *(["--resume"] if epoch else []), *(["--shard-mb", "1"] * (epoch % 2)))
        parts.move()
    assert parts.reduce("--resume", "--max-seconds", "0")["reduced"] == summary["reduced"]
    for ended in ("teacher", "reduced"):
        networks = [load_network(Run(getattr(place, ended)))[1] for place in (whole, parts)]
        assert same(*(network.state_dict() for network in networks))
    config = Run(parts.reduced).config()
    assert (config["data_dir"], config["teacher"]) == (str(parts.data), str(parts.teacher))
    assert config["fingerprints"] == Run(whole.reduced).config()["fingerprints"]
    assert json.loads(call("evaluate", str(parts.reduced), "--json"))["accuracy"] == summary["reduced"]["accuracy"]


@pytest.mark.slow
def test_a_folder_of_images_may_move(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    words = ("train", *SMALL, "--out", str(tmp_path / "run"))
    with pytest.raises(ShoalError, match="time is up"):
        call(*words, "--data", str(tmp_path / "a"), "--max-seconds", "0")
    (tmp_path / "a").rename(tmp_path / "b")
    call(*words, "--data", str(tmp_path / "b"), "--resume")
    (tmp_path / "b").rename(tmp_path / "c")
    call("evaluate", str(tmp_path / "run"), "--data-dir", str(tmp_path / "c"), "--json")
    prune = ("prune", str(tmp_path / "run"), "--epochs", "1", "--out", str(tmp_path / "pruned"), "--json")
    call(*prune, "--data-dir", str(tmp_path / "c"))
    assert Run(tmp_path / "pruned").config()["data_dir"] == str(tmp_path / "c")
    call("evaluate", str(tmp_path / "pruned" / "amount-0.5"), "--json")  # where they lay last
    call(*prune, "--data-dir", str(tmp_path / "c"), "--resume")


def test_other_data_are_refused(cifar: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, cifar)
    with pytest.raises(ShoalError, match="time is up"):
        place.train("--max-seconds", "0")
    before = Run(place.teacher).read_json("config.json")
    shutil.rmtree(place.data)
    write_cifar(place.data, "cifar10")  # others: the generator has gone on
    with pytest.raises(ShoalError, match=r"other data at .*data0 than the run at .*; need the same .*--data-dir"):
        place.train("--resume")
    assert Run(place.teacher).read_json("config.json") == before
    Run(place.teacher).write_json("config.json", {k: v for k, v in before.items() if k != "fingerprints"})
    place.train("--resume")  # a run of an earlier version says nothing of its data
    assert Run(place.teacher).config()["fingerprints"].keys() == {"data"}
    shutil.rmtree(place.data)
    shutil.copytree(cifar, place.data)
    with pytest.raises(ShoalError, match="other data at"):
        place.train("--resume")


# ---------------------------------------------------------------- another network in the place of the first


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that differ by what they have learnt alone."""
    folder = tmp_path_factory.mktemp("teachers")
    words = ("train", *SMALL, "--data", "digits", "--limit", "100")
    for name in ("first", "second"):
        call(*words, "--out", str(folder / name))
    run = Run(folder / "second")
    spec, network = load_network(run)
    with torch.no_grad():
        next(network.parameters())[0] += 1e-6
    save_network(run, spec, network)
    return folder / "first", folder / "second"


STARTED: dict[str, tuple[Callable[[str], tuple[str, ...]], str]] = {
    "reduce": (lambda t: ("reduce", t, "--budget", "300", "--epochs", "1,1,3"), "teacher"),
    "deepreduce": (lambda t: ("reduce", t, "--recipe", "deepreduce", "--designs", "1", "--epochs", "1,1"), "teacher"),
    "distill": (lambda t: ("distill", "kd", *SMALL[:-1], "--teacher", t), "teacher"),
    "self-distill": (lambda t: ("self-distill", t, "--epochs", "2"), "source"),
    "beside": (
        lambda t: ("self-distill", *SMALL[:-1], "--data", "digits", "--limit", "100", "--beside", "kd", "--teacher", t),
        "teacher",
    ),
    "prune": (lambda t: ("prune", t, "--epochs", "2"), "source"),
}


@pytest.mark.parametrize("name", fast_where(lambda name: name in ("distill", "prune"), STARTED))
def test_another_network_at_the_same_place_is_refused(name: str, teachers: tuple[Path, Path], tmp_path: Path) -> None:
    words, setting = STARTED[name]
    here, run = tmp_path / "here", Run(tmp_path / "out")
    shutil.copytree(teachers[0], here)
    on = ("--out", str(run.folder), "--max-seconds", "0", "--json", "--resume")
    with pytest.raises(ShoalError, match="time is up"):
        call(*words(str(here)), *on)
    before = {path: path.read_bytes() for path in run.folder.glob("*.safetensors")}
    shutil.rmtree(here)
    shutil.copytree(teachers[1], here)
    for _ in range(2):
        with pytest.raises(ShoalError, match=r"another network at .*here than the run at .*; need the same"):
            call(*words(str(here)), *on)
    assert before == {path: path.read_bytes() for path in run.folder.glob("*.safetensors")}
    with pytest.raises(ShoalError, match="time is up"):
        call(*words(str(teachers[0])), *on)
    assert run.read_json("config.json")[setting] == str(teachers[0])


def test_a_reduction_of_an_earlier_version_has_its_teacher_to_be_compared_with(
    teachers: tuple[Path, Path], tmp_path: Path
) -> None:
    words, run = STARTED["reduce"][0], Run(tmp_path / "out")
    on = ("--out", str(run.folder), "--max-seconds", "0", "--json", "--resume")
    with pytest.raises(ShoalError, match="time is up"):
        call(*words(str(teachers[0])), *on)
    config = run.read_json("config.json")
    config.pop("fingerprints")
    run.write_json("config.json", config)
    with pytest.raises(ShoalError, match=r"another network at .*second"):
        call(*words(str(teachers[1])), *on)
    assert "fingerprints" not in run.read_json("config.json")
    with pytest.raises(ShoalError, match="time is up"):
        call(*words(str(teachers[0])), *on)
    assert run.read_json("config.json")["fingerprints"].keys() == {"data", "teacher"}


def test_a_plan_may_lie_elsewhere_and_may_not_change(tmp_path: Path) -> None:
    data, plans = blobs(32), [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for path, text in zip(plans, ('{"x": 1, "y": 2}', '{"y": 2,\n "x": 1}', '{"x": 1, "y": 3}'), strict=True):
        path.write_text(text)
    configs = [began({"data": "digits", "plan": path}, data, None, plan=path) for path in plans]
    run = Run.create(tmp_path / "run", configs[0])
    Run.create(run.folder, configs[1], resume=True)
    assert run.read_json("config.json")["plan"] == str(plans[1])
    with pytest.raises(ShoalError, match=r"another plan at .*c\.json than the run at"):
        Run.create(run.folder, configs[2], resume=True)


def test_settings_of_another_kind_in_a_configuration_are_no_crash(tmp_path: Path) -> None:
    config = {"data": "digits", "seed": 0}
    for odd in (None, 3, [], {"data": 3}, {"data": None}):
        run = Run.create(tmp_path / str(odd), config | {"fingerprints": odd})
        Run.create(run.folder, config, resume=True)
