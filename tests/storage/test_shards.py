"""Weights in several files: laws of reading back, and a kill between any two steps."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network, save_network
from shoal.storage.checkpoint import Checkpoint
from shoal.storage.run import Run
from shoal.storage.shard_index import Index, read_index
from shoal.storage.shards import SMALLEST_LIMIT, index_path, indexed, pack
from shoal.storage.tensors import fit_files, has_tensors, read_tensors, read_with_metadata, write_tensors
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.cli.test_commands import call
from tests.conftest import Residual, blobs
from tests.support.fits import kill_in_the_middle
from tests.support.sharded import FACTS, LIMIT, TYPES, names, same, shards, some

# ---------------------------------------------------------------- laws


def test_all_types_come_back_bit_for_bit_from_files_below_the_limit(tmp_path: Path) -> None:
    path, tensors = tmp_path / "model.safetensors", some()
    write_tensors(path, tensors, FACTS, LIMIT)
    assert not path.exists()
    assert has_tensors(path)
    found, facts = read_with_metadata(path)
    assert same(found, tensors)
    assert list(found) == list(tensors)
    assert facts == FACTS
    assert len(shards(tmp_path)) > 10
    assert names(tmp_path) == sorted(["model.index.json", *(p.name for p in shards(tmp_path))])
    assert all(p.stat().st_size <= LIMIT for p in tmp_path.iterdir())
    for shard in shards(tmp_path):  # each is a safetensors file by itself
        assert load_file(shard).keys() <= tensors.keys()


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
named = st.dictionaries(
    st.text(max_size=8),
    st.tuples(st.sampled_from(TYPES), st.one_of(shapes, st.tuples(st.integers(9_000, 70_000)))),
    max_size=6,
)


@settings(max_examples=40)
@given(named, st.integers(SMALLEST_LIMIT, 3 * SMALLEST_LIMIT))
def test_any_tensors_come_back(kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {k: torch.randint(0, 2, shape, generator=generator).to(t) for k, (t, shape) in kinds.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.b.safetensors"
        write_tensors(path, tensors, None, limit)
        assert same(read_tensors(path), tensors)
        assert all(file.stat().st_size <= limit for file in path.parent.iterdir())


@settings(max_examples=100)
@given(st.lists(st.integers(0, 3_000), max_size=30), st.integers(1_000, 4_000))
def test_pieces_are_each_element_once(sizes: list[int], limit: int) -> None:
    tensors = {f"t{i}": torch.arange(size) for i, size in enumerate(sizes)}
    joined: dict[str, list[Tensor]] = {name: [] for name in tensors}
    for part in pack(tensors, limit):
        for name, piece in part.items():
            joined[name].append(piece)
    assert all(torch.equal(torch.cat(pieces), tensors[name]) for name, pieces in joined.items())


def test_one_file_and_several_take_each_others_place(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "model.shard-0123456789abcdef.safetensors.bak").write_text("another's")
    (tmp_path / "remodel.shard-0123456789abcdef.safetensors").write_text("another's")
    others = names(tmp_path)
    for i, limit in enumerate((None, LIMIT, 2 * LIMIT, None, 150_000, LIMIT)):
        write_tensors(path, some(i), FACTS, limit)
        assert same(read_tensors(path), some(i))
        files = set(names(tmp_path)) - set(others)
        if limit is None:
            assert files == {path.name}
        else:
            assert files == {"model.index.json", *(f.name for f in read_index(index_path(path)).files)}
    assert set(others) < set(names(tmp_path))


@pytest.mark.parametrize("limit", [0, -1, 63_999])
def test_a_limit_too_small_is_refused(limit: int, tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=r"limit of .* MB .*need 0\.064 or more"):
        write_tensors(tmp_path / "a.safetensors", {}, None, limit)
    assert names(tmp_path) == []


def test_what_fits_no_file_is_refused_and_the_old_set_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, some(), FACTS, LIMIT)
    before = names(tmp_path)
    for tensors, facts, pattern in (
        ({"n" * 70_000: torch.ones(3)}, {}, "no room for tensor 'nnn"),
        ({"a": torch.ones(30_000)}, {"progress": "x" * 70_000}, "index of 70.* bytes"),
    ):
        with pytest.raises(ShoalError, match=pattern):
            write_tensors(path, tensors, facts, LIMIT)
        assert names(tmp_path) == before
    assert same(read_tensors(path), some())


# ---------------------------------------------------------------- kills


class Killed(BaseException):
    """Ends the process as far as the code under test can tell."""


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """From the step-th touch of a folder or file on nothing happens any more: a dead process cleans nothing up."""
    done = [0]

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **more: Any) -> Any:
            done[0] += 1
            if done[0] > step:
                raise Killed
            return real(*args, **more)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        for name in ("unlink", "write_bytes", "write_text", "mkdir"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        yield done


def few(seed: int) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in some(seed).items() if name in ("large", "one")}


@pytest.mark.parametrize(
    ("before", "after"), [(None, LIMIT), (LIMIT, LIMIT), (LIMIT, 2 * LIMIT), (LIMIT, None), (None, None)]
)
def test_a_kill_between_any_two_steps_leaves_the_old_or_the_new(
    before: int | None, after: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, ended, seen = 0, False, set()
    while not ended:
        path = tmp_path / str(step) / "model.safetensors"
        write_tensors(path, few(0), FACTS, before)
        with killed_at(step, monkeypatch):
            try:
                write_tensors(path, few(1), FACTS, after)
                ended = True
            except Killed:
                pass
        found = read_tensors(path)
        old, new = same(found, few(0)), same(found, few(1))
        assert old or new
        assert new or not ended
        seen.add(new)
        write_tensors(path, few(2), FACTS, LIMIT)  # going on clears what the kill has left
        assert same(read_tensors(path), few(2))
        assert len(names(path.parent)) == 1 + len(shards(path.parent))
        step += 1
    assert seen == {False, True}


def test_a_disk_that_refuses_keeps_the_old_set_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, some(0), FACTS, LIMIT)
    before = names(tmp_path)
    replace, count = os.replace, [0]

    def full(*args: Any) -> None:
        count[0] += 1
        if count[0] == 5:
            raise OSError(28, "No space left on device")
        replace(*args)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ShoalError, match="cannot be written"):
        write_tensors(path, some(1), FACTS, LIMIT)
    assert names(tmp_path) == before
    assert same(read_tensors(path), some(0))


# ---------------------------------------------------------------- training and runs

DATA = blobs(64)
PLAN = Schedule(4, 0.1, (3,), batch_size=16)


class Wide(nn.Module):
    """Large enough for several files, with a layer larger than one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body, self.wide = Residual(64), nn.Sequential(nn.ReLU(), nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(self.body(x))


def trained(
    folder: Path | None, limit: int | None = None, progress: Callable[..., None] | None = None, **options: Any
) -> dict[str, Tensor]:
    model, own = Wide(), Settings(**options)
    checkpoint = Checkpoint(folder, shard_bytes=limit) if folder else None
    objective = Objective((cross_entropy(),))
    fit(model, DATA, objective, PLAN, settings=own, checkpoint=checkpoint, progress=progress)
    return model.state_dict()


@pytest.mark.usefixtures("epochwise")
def test_training_resumed_from_any_limit_equals_training_in_one_go(tmp_path: Path) -> None:
    whole = trained(None)
    for number, limits in enumerate(([LIMIT] * 4, [LIMIT, None, LIMIT, 100_000], [None, LIMIT, LIMIT, None])):
        folder = tmp_path / str(number)
        for limit in limits:
            trained(folder, limit, max_seconds=0.0, resume=True)  # an epoch each
            assert Checkpoint(folder).has_best
            assert Checkpoint(folder).has_last
            assert (folder / "model.last.safetensors").exists() == (limit is None)
            assert limit is None or all(p.stat().st_size <= limit for p in folder.glob("model.last.*"))
        assert same(trained(folder, None, resume=True), whole)


def train_at(folder: Path, progress: Any) -> None:
    trained(folder, LIMIT, progress=progress)


@pytest.mark.slow
def test_kill_dash_nine_then_resume_from_shards_is_bit_identical(tmp_path: Path) -> None:
    kill_in_the_middle(train_at, tmp_path)
    assert (tmp_path / "model.last.index.json").exists()
    assert not list(tmp_path.glob("*.last.safetensors"))
    assert same(trained(tmp_path, LIMIT, resume=True), trained(None))


def test_a_run_keeps_networks_in_shards(tmp_path: Path) -> None:
    spec = Spec("resnet10", 10, (1, 16, 16), 0.25)
    model = assemble(spec)
    run = Run.create(tmp_path, {"data": "digits"}, shard_bytes=LIMIT)
    save_network(run, spec, model)
    assert run.has("model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
    assert run.checkpoint("a").shard_bytes == LIMIT
    assert same(load_network(Run(tmp_path))[1].state_dict(), model.state_dict())
    save_network(Run(tmp_path), spec, model)
    assert names(tmp_path) == ["config.json", "environment.json", "model.json", "model.safetensors"]
    assert run.below("widths/1").shard_bytes == LIMIT
    Run.create(tmp_path, {"data": "digits"}, resume=True, shard_bytes=LIMIT)  # what was there must be below it, too
    shards(tmp_path)[0].unlink()
    with pytest.raises(ShoalError, match=r"no file at .*model\.shard-"):
        load_network(Run(tmp_path))


@pytest.mark.parametrize("name", ["train", "reduce", "self-distill", "inplace", "distill", "prune"])
def test_commands_that_train_take_a_limit(name: str) -> None:
    assert "--shard-mb" in call(name, "--help")


@pytest.mark.slow
def test_a_command_line_of_any_limit_goes_on_with_one_run(tmp_path: Path) -> None:
    words = ("train", "resnet10", "--data", "digits", "--limit", "100", "--epochs", "2", "--width", "0.5", "--json")
    out = ("--out", str(tmp_path / "out"))
    with pytest.raises(ShoalError, match="time is up"):
        call(*words, *out, "--max-seconds", "0")
    body = json.loads(call(*words, *out, "--resume", "--shard-mb", "0.3"))
    found = list((tmp_path / "out").rglob("*.safetensors"))
    assert {path.name.partition(".shard-")[0] for path in found} == {"model", "teacher.best", "teacher.last"}
    assert all(0 < path.stat().st_size <= 300_000 for path in found)
    assert json.loads(call("evaluate", out[1], "--json"))["accuracy"] == body["accuracy"]
    assert json.loads(call(*words, "--out", str(tmp_path / "whole")))["validation"] == body["validation"]
    assert same(*(load_network(Run(tmp_path / f))[1].state_dict() for f in ("out", "whole")))


def test_a_folder_is_brought_below_another_limit(tmp_path: Path) -> None:
    for name, limit in (("a", None), ("b", LIMIT), ("c", 3 * LIMIT)):
        write_tensors(tmp_path / f"{name}.safetensors", some(), FACTS, limit)
    write_tensors(tmp_path / "small.safetensors", {"x": torch.ones(3)})
    b = {path: path.stat().st_mtime_ns for path in tmp_path.glob("b.*")}
    fit_files(tmp_path, LIMIT)
    assert all(path.stat().st_size <= LIMIT for path in tmp_path.iterdir())
    assert all(read_with_metadata(tmp_path / f"{name}.safetensors")[1] == FACTS for name in "abc")
    assert all(same(read_tensors(tmp_path / f"{name}.safetensors"), some()) for name in "abc")
    assert b == {path: path.stat().st_mtime_ns for path in tmp_path.glob("b.*")}
    assert (tmp_path / "small.safetensors").exists()
    write_tensors(tmp_path / "a.safetensors", {}, {"progress": "x" * 100_000}, 3 * LIMIT)
    with pytest.raises(ShoalError, match=r"index of .* bytes"):
        fit_files(tmp_path, LIMIT)


def test_an_index_says_where_everything_lies() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5)}
    index = indexed(tensors, {}, [])
    assert index == Index((), index.tensors, {})
    assert json.loads(index.text())["tensors"]["a"] == {"dtype": "float32", "shape": [2, 3], "pieces": []}
