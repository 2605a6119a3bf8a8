"""What DeepReDuce's Tables 1 and 7 and Figure 3 ask: designs without stages, other teachers or none, and layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from benchmarks.training import paper_scale
from shoal.errors import ShoalError
from shoal.models import build
from shoal.networks.spec import Spec
from shoal.recipes import deepreduce
from shoal.recipes.deepreduce import front
from shoal.recipes.deepreduce.designs import Design, drops, parse
from shoal.recipes.deepreduce.front import Point
from shoal.recipes.deepreduce.space import DesignSpace
from shoal.recipes.deepreduce.training import Teaching, Trainer
from shoal.recipes.stages import Stages
from shoal.reduction.dropping import drop_relus
from shoal.storage.run import Run
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.cli.test_commands import call
from tests.conftest import Residual, blobs
from tests.recipes.test_designs import CIFAR, words


@pytest.mark.parametrize(
    ("name", "design"),
    [
        ("Conv1", Design((1, 2, 3), stem=True)),
        ("NoReLUs", Design((1, 2, 3))),
        ("Conv1-a0.5-r0.5", Design((1, 2, 3), (), 0.5, 0.5, stem=True)),
    ],
)
def test_designs_without_stages_have_names(name: str, design: Design) -> None:
    assert parse(name, (0, 1, 2, 3)) == design
    assert design.name((0, 1, 2, 3)) == name


def test_a_network_whose_stem_has_no_relus_has_no_design_conv1() -> None:
    model = drop_relus(build("resnet10", 10, width=0.125), ["relu"])
    with pytest.raises(ShoalError, match="found no ReLUs in the stem; need some for Conv1"):
        drops(parse("Conv1", (1, 2, 3, 4)), model, CIFAR)


@pytest.mark.slow
def test_count_takes_the_designs_of_table_1_without_stages() -> None:
    """ResNet18's columns "No ReLUs" and "Conv1": 0 and 66K."""
    bodies = [json.loads(call("count", "resnet18", "--design", name, "--json")) for name in ("NoReLUs", "Conv1")]
    assert [body["relus"] for body in bodies] == [0, 65_536]
    assert [[site["name"] for site in body["sites"]] for body in bodies] == [[], ["relu"]]
    assert [body["merging"]["unmerged"]["convs"] for body in bodies] == [17, 17]


def test_count_lists_the_layers_with_their_parameters_macs_and_relus() -> None:
    """Figure 3: parameters grow with ResNet18's depth and ReLUs fall. The sums over layers are the totals."""
    body = json.loads(call("count", "resnet18", "--classes", "100", "--layers", "--json"))
    rows = {row["name"]: row for row in body["layers"]}
    for key in ("params", "macs", "linear_macs", "relus"):
        assert sum(row[key] for row in rows.values()) == body[key]
    first, last = rows["layer1.0.conv1"], rows["layer4.1.conv2"]
    assert (first["params"], first["macs"]) == (64 * 64 * 9, 64 * 64 * 9 * 32 * 32)
    assert (last["params"], last["macs"]) == (512 * 512 * 9, 512 * 512 * 9 * 4 * 4)
    assert (rows["fc"]["params"], rows["fc"]["linear_macs"]) == (512 * 100 + 100, 512 * 100)
    assert [rows[f"layer{k}.0.relu1"]["relus"] for k in (1, 2, 3, 4)] == [65_536, 32_768, 16_384, 8_192]
    assert rows["bn1"]["params"] == 2 * 64
    assert "layers" not in json.loads(call("count", "resnet9", "--json"))
    text = " ".join(call("count", "resnet9", "--layers").split())
    assert "layer operation shape parameters MACs ReLUs" in text
    assert "does not include 5,120 of linear layers" in text


PLAN = deepreduce.Preset(*(Schedule(1, 0.05, batch_size=32),) * 3)


def test_a_design_without_relus_is_trained_counted_and_drawn(tmp_path: Path) -> None:
    """It is an affine map, which `fold` turns into one linear layer; a log scale has no place for it."""
    options = deepreduce.Options(budget=0, designs=("NoReLUs", "Conv1", "S2"))
    spec, run = Spec("given", 4, (1, 8, 8)), Run(tmp_path)
    result = deepreduce.reduce(spec, Residual(), options, PLAN, Stages(blobs(64), Settings(), run))
    relus = {point.name: point.relus for point in result.points}
    assert relus == {"Conv1": 4 * 64, "NoReLUs": 0, "S2": 8 * 16 * 2}
    assert result.chosen.name == "NoReLUs"
    found = Run(tmp_path / "designs" / "NoReLUs").read_json("figures.json")
    assert (found["relus"], found["merging"]["folded"]["convs"]) == (0, 0)
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("fewest", "scale"), [(0, "symlog"), (4, "log")])
def test_every_design_has_a_place_in_the_plot(
    fewest: int, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []

    @contextmanager
    def drawing(path: Path, size: tuple[float, float]) -> Iterator[list[Any]]:
        shown.append(Figure(figsize=size).subplots())
        yield shown

    monkeypatch.setattr(front, "drawing", drawing)
    points = [Point("a", fewest, 20.0, 20.0), Point("b", 100, 50.0, 50.0)]
    front.plot_front(points, Point("baseline", 900, 60.0, 60.0), tmp_path / "front.png")
    (axes,) = shown
    assert axes.get_xscale() == scale
    assert axes.get_xlim()[0] < fewest


def learned(folder: Path, teaching: Teaching | None, design: str = "S2") -> tuple[Run, dict[str, Any]]:
    """The run of a trained design, and the row that its training logged."""
    torch.manual_seed(0)
    spec, teacher = Spec("given", 4, (1, 8, 8)), Residual().eval()
    trainer = Trainer(DesignSpace(spec, teacher), PLAN, Stages(blobs(64), Settings(), Run(folder)), teaching)
    trainer.design(trainer.space.plan(parse(design, trainer.space.stages)))
    own = Run(folder / "designs" / design)
    return own, json.loads((own.folder / "metrics.jsonl").read_text())


def test_a_design_without_kd_is_trained_as_the_baseline_is(tmp_path: Path) -> None:
    """A design that drops nothing has the baseline's network; without distillation both are equal bit for bit."""
    own, row = learned(tmp_path / "labels", Teaching(designs=False), "S1+S2")
    assert "kd" not in row
    assert own.read_json("config.json")["kd"] is False
    mine, baseline = (load_file(folder / "model.safetensors") for folder in (own.folder, tmp_path / "labels/baseline"))
    assert mine.keys() == baseline.keys()
    assert all(torch.equal(mine[name], baseline[name]) for name in mine)
    assert paper_scale.design_name(own.folder) == "S1+S2 without KD"
    own, row = learned(tmp_path / "distilled", None, "S1+S2")
    assert row["kd"] > 0
    assert paper_scale.design_name(own.folder) == "S1+S2"
    assert "kd" not in own.read_json("config.json")
    taught = load_file(own.folder / "model.safetensors")
    assert not all(torch.equal(taught[name], baseline[name]) for name in baseline)


def test_another_network_can_teach_the_designs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    same, other = Residual().eval(), Residual().eval()
    usual = learned(tmp_path / "usual", None)[1]
    assert learned(tmp_path / "same", Teaching(same))[1]["kd"] == usual["kd"]
    assert learned(tmp_path / "other", Teaching(other))[1]["kd"] != usual["kd"]


@pytest.mark.slow
def test_the_command_takes_another_teacher_or_none(tmp_path: Path) -> None:
    """Table 7's way: a small network, taught by a larger one. The run says who taught, and no other may go on."""
    small = ("--data", "digits", "--width", "0.125", "--limit", "200", "--epochs", "1")
    runs = tmp_path / "runs"
    call("train", "resnet10", *small, "--preset", "deepreduce-paper-cifar10", "--out", runs / "teacher", "--json")
    call("train", "resnet9", *small, "--out", tmp_path / "other", "--json")
    more = ("--designs", "S4", "--taught-by", str(tmp_path / "other"))
    body = json.loads(call(*words(runs, "taught", *more)))
    assert body["taught_by"] == "resnet9"
    assert Run(runs / "taught").read_json("config.json")["taught_by"] == str(tmp_path / "other")
    with pytest.raises(ShoalError, match="found another network"):
        call(*words(runs, "taught", "--designs", "S4", "--taught-by", str(runs / "teacher"), "--resume"))
    text = call(*(w for w in words(runs, "labels", "--designs", "S4", "--no-kd") if w != "--json"))
    assert "taught by labels only" in " ".join(text.split())
    for name, wanted in (("taught", True), ("labels", False)):
        assert ("kd" in json.loads((runs / name / "designs/S4/metrics.jsonl").read_text())) == wanted
    with pytest.raises(ShoalError, match="with --no-kd and named designs"):
        call(*words(runs, "both", *more, "--no-kd"))
    call("train", "resnet9", *small, "--seed", "1", "--out", tmp_path / "seeded", "--json")
    with pytest.raises(ShoalError, match="found --seed 0 and a teacher of seed 1"):
        call(*words(runs, "both", "--designs", "S4", "--taught-by", str(tmp_path / "seeded")))
    config = tmp_path / "seeded" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"seed": 0, "mean": [0.5], "std": [0.5]}))
    with pytest.raises(ShoalError, match="found the images' mean None and a teacher of mean"):
        call(*words(runs, "both", "--designs", "S4", "--taught-by", str(tmp_path / "seeded")))
    for option, name in ((("--no-kd",), "no-kd"), (more[2:], "taught-by")):
        with pytest.raises(ShoalError, match=f"found {name} for recipe shallow"):
            call("reduce", str(runs / "teacher"), "--budget", "9", *option, "--out", str(runs / "both"))
    assert not (runs / "both").exists()
