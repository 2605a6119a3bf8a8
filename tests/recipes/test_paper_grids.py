"""The grids at the papers' settings: every run of them is one that its command takes, at either scale."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.training import paper_scale
from shoal.recipes.deepreduce.designs import parse
from shoal.recipes.shallow.presets import PRESETS
from shoal.sweep.grid import read_grid
from shoal.training.settings import PRECISIONS, STEPS
from tests.sweep.test_grid import KNOWN

ROOT = Path(__file__).parents[2]

GRIDS = {"resnet18": 21, "wrn22_8": 3, "deepreduce": 2}
SMALL = ("device=cpu", "precision=fp32", "step=eager", "save-seconds=0")


def option(words: tuple[str, ...], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


@pytest.mark.parametrize("overrides", [(), SMALL])
@pytest.mark.parametrize(("name", "count"), GRIDS.items())
def test_every_run_is_one_that_its_command_takes(
    name: str, count: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    runs = read_grid(ROOT / "examples" / "paper" / f"{name}.yaml", KNOWN, tmp_path, overrides)
    assert len(runs) == count
    known = {run.name for run in runs}
    for run in runs:
        assert set(run.needs) <= known
        assert (option(run.words, "--device"), option(run.words, "--step")) == (
            ("cpu", "eager") if overrides else ("cuda", "graph")
        )
        assert option(run.words, "--step") in STEPS
        assert option(run.words, "--precision") in PRECISIONS
        assert option(run.words, "--preset") in (*PRESETS, "deepreduce-paper")
    reductions = [run for run in runs if run.words[0] == "reduce"]
    assert all(any("teacher" in need for need in run.needs) for run in reductions)


def test_every_published_figure_has_a_run(tmp_path: Path) -> None:
    """And it is one of the names that `paper_scale` gives to networks."""
    made = set()
    for name, base in (("resnet18", "resnet18"), ("wrn22_8", "wrn-22-8"), ("deepreduce", "resnet18")):
        for run in read_grid(ROOT / "examples" / "paper" / f"{name}.yaml", KNOWN, tmp_path):
            designs = option(run.words, "--designs")
            axes = [str(run.axes[axis]) for axis in ("masks", "budget") if axis in run.axes]
            made |= {f"{base} {' '.join([run.stage, *axes])}"}
            made |= {f"{base} {parse(d, range(5)).name(range(5))}" for d in designs.split(",")} if designs else set()
    assert set(paper_scale.PUBLISHED) <= made
