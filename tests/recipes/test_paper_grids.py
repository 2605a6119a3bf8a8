"""The grids at the papers' settings: every run of them is one that its command takes, at either scale."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from benchmarks.training import paper_scale
from shoal.jobs import distill, prune
from shoal.jobs.train import teacher_presets
from shoal.models import KNOWN as KNOWN_NETWORKS
from shoal.recipes import deepreduce, inplace, osakd, self_distill
from shoal.recipes.comparators import METHODS
from shoal.recipes.deepreduce.designs import parse
from shoal.recipes.shallow.presets import PRESETS
from shoal.sweep.grid import Planned, read_grid
from shoal.training.settings import PRECISIONS, STEPS
from tests.sweep.test_grid import KNOWN
from tests.training.test_training import RESNET18, golden

ROOT = Path(__file__).parents[2]

FOLDER = ROOT / "examples" / "paper"
GRIDS = {
    "cifar10": 6,
    "deepreduce": 10,
    "deepreduce_fronts": 5,
    "deepreduce_resnet34": 3,
    "deepreduce_resnet56": 8,
    "deepreduce_tiny_imagenet": 7,
    "inplace": 16,
    "osakd": 55,
    "resnet18": 22,
    "self_distillation": 14,
    "self_distillation_comparison": 30,
    "self_distillation_imagenet": 6,
    "self_distillation_modelnet": 6,
    "self_distillation_pruning": 12,
    "self_distillation_setting": 30,
    "self_distillation_studies": 59,
    "wrn22_8": 3,
}
"""Grid file -> its number of runs."""
SMALL = ("device=cpu", "precision=fp32", "step=eager", "save-seconds=0")


def test_every_grid_of_the_folder_is_known() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(GRIDS)


def option(words: tuple[str, ...], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def presets(command: str, recipe: str | None) -> Collection[str]:
    """The presets of a command, those of `distill` for any method."""
    known: dict[str, Collection[str]] = {
        "train": teacher_presets(),
        "reduce": deepreduce.PRESETS if recipe == "deepreduce" else PRESETS,
        "self-distill": self_distill.PRESETS,
        "inplace": inplace.PRESETS,
        "distill": osakd.PRESETS,
    }
    return known[command]


def check_names(run: Planned) -> None:
    """What a command looks up by name when it begins: its preset, network and method; and where the seed comes from."""
    words, command = run.words, run.words[0]
    if command == "prune":
        assert option(words, "--method") in prune.METHODS
        return
    preset = option(words, "--preset")
    assert preset in presets(command, option(words, "--recipe")) or (preset is None and "--schedule" in words)
    if command != "reduce":
        assert words[-1] in KNOWN_NETWORKS
    if command == "distill":
        assert words[-2] in (distill.OSAKD, *METHODS)
        taught = "--teacher" in words
        assert taught == (words[-2] in METHODS and METHODS[words[-2]].teacher)
        assert taught != ("--data" in words)
        assert not (taught and "--seed" in words)  # the teacher's run decides data and seed


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
        check_names(run)
    reductions = [run for run in runs if run.words[0] == "reduce"]
    assert all(any("teacher" in need for need in run.needs) for run in reductions)


def planned(name: str, folder: Path) -> tuple[Planned, ...]:
    return read_grid(ROOT / "examples" / "paper" / f"{name}.yaml", KNOWN, folder)


@pytest.mark.parametrize(
    ("data", "grids"), [("cifar100", ("resnet18", "wrn22_8", "deepreduce")), ("cifar10", ("cifar10",))]
)
def test_every_published_figure_has_a_run(data: str, grids: tuple[str, ...], tmp_path: Path) -> None:
    """And it is one of the names that `paper_scale` gives to networks."""
    made: set[str] = set()
    for name in grids:
        runs = planned(name, tmp_path)
        assert {option(run.words, "--data") for run in runs if run.words[0] == "train"} == {data}
        networks = {str(run.folder): run.words[-1] for run in runs if run.words[0] == "train"}
        for run in runs:
            base = networks.get(run.words[-1], run.words[-1])
            made |= {f"{base} {own}" for own in names(run)}
    assert set(paper_scale.PUBLISHED[data]) <= made


def names(run: Planned) -> list[str]:
    designs = option(run.words, "--designs")
    if designs is None:
        return [" ".join([run.stage, *(str(run.axes[axis]) for axis in paper_scale.AXES if axis in run.axes)])]
    mark = " without KD" if "--no-kd" in run.words else ""
    return [parse(design, range(5)).name(range(5)) + mark for design in designs.split(",")]


def test_the_two_papers_teachers_have_their_own_figures() -> None:
    """78.05 % is the baseline of Making Models Shallow Again, 74.46 % that of DeepReDuce."""
    known = paper_scale.PUBLISHED["cifar100"]
    assert known["resnet18 teacher"] == (78.05, paper_scale.SHALLOW)
    assert known["resnet18 deepreduce-teacher"] == (74.46, paper_scale.DEEP)
    assert known["wrn-22-8 gated 240000"] == (79.62, paper_scale.SHALLOW)


@pytest.mark.parametrize("name", ["resnet18", "cifar10"])
def test_table_2_is_one_network_read_at_either_end(name: str, tmp_path: Path) -> None:
    """Gated branches and the auxiliary classifier in both rows; only the classifier that is kept differs."""
    runs = [run for run in planned(name, tmp_path) if run.stage == "auxiliary"]
    pairs: dict[str, set[str | None]] = {}
    for run in runs:
        assert {"--gates", "--exit"} <= set(run.words)
        pairs.setdefault(str(option(run.words, "--budget")), set()).add(option(run.words, "--keep"))
    assert all(ends == {"final", "auxiliary"} for ends in pairs.values())
    assert ("100000" if name == "resnet18" else "150000") in pairs


def test_table_2s_rows_on_cifar_10_follow_from_150k_relus(tmp_path: Path) -> None:
    """At the grid's d_th it replaces the two blocks of the first stage (14 convolutions, as printed) and no other.

    With the recovered sensitivities, which are those on CIFAR-100, 3.88x fewer ReLUs are left; 3.94x is printed.
    """
    run = next(run for run in planned("cifar10", tmp_path) if run.stage == "auxiliary")
    threshold, counts = float(option(run.words, "--d-th") or 0), golden(int(option(run.words, "--budget") or 0))
    inner = [i for i in range(1, 17, 2) if counts[i] / RESNET18[i] <= threshold]
    assert inner == [1, 3]
    assert sum(RESNET18) / (sum(counts) - counts[1] - counts[3]) == pytest.approx(3.94, abs=0.06)


def test_the_papers_preset_has_the_epochs_that_the_page_states() -> None:
    preset = PRESETS["paper"]()
    stages = (preset.teacher, preset.sensitivity, preset.mask, preset.finetune)
    epochs = [schedule.epochs for schedule in stages]
    assert epochs == [240, 30, 150, 180]
    page = (ROOT / "docs" / "papers" / "shallow.md").read_text()
    assert f"{sum(epochs)} epochs in all" in page
