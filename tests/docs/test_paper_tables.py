"""Each paper's page names a grid for every table of the paper, or the reason why there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.pages.grid_sections import PAPERS, needed, two_digits
from benchmarks.pages.readme import MARKED
from benchmarks.pages.result_tables import result
from benchmarks.training.grid_minutes import label, seconds
from benchmarks.training.grid_work import trainings
from shoal.networks.spec import Spec
from shoal.recipes import self_distill
from shoal.sweep.grid import Planned, read_grid
from shoal.training.schedule import SCHEDULES, Schedule
from tests.sweep.test_grid import KNOWN

ROOT = Path(__file__).parents[2]
GRIDS = ROOT / "examples" / "paper"
TABLES = {
    "grids_shallow": ("1", "2"),
    "grids_deepreduce": tuple(map(str, range(1, 15))),
    "grids_self_distillation": tuple(map(str, range(1, 12))),
    "grids_inplace": ("I", "II"),
    "grids_osakd": ("I", "II"),
}
"""The numbers of each paper's tables, with those of its appendix."""
ROLES = ("self", "plain")
"""The stages of Fig. 6 that train the networks before they are pruned."""
ROWS = [row for rows in PAPERS.values() for row in rows]


def planned(name: str) -> tuple[Planned, ...]:
    return read_grid(GRIDS / f"{name}.yaml", KNOWN, Path("runs"))


@pytest.mark.parametrize("paper", PAPERS)
def test_every_table_has_a_grid_or_a_reason(paper: str) -> None:
    titles = " ".join(row.title for row in PAPERS[paper])
    found = {
        number for few in re.findall(r"Tables? ([\dIV]+(?: and [\dIV]+)?)", titles) for number in few.split(" and ")
    }
    assert found == set(TABLES[paper])
    assert all(row.grid or row.remark for row in PAPERS[paper])


@pytest.mark.parametrize("paper", PAPERS)
def test_the_section_is_on_the_papers_page(paper: str) -> None:
    page = (ROOT / "docs" / "papers" / f"{paper.removeprefix('grids_')}.md").read_text()
    assert paper in [match[2] for match in MARKED.finditer(page)]


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_stage_belongs_to_a_table_and_was_timed(path: Path) -> None:
    stages = result("grid_minutes")["grids"][path.stem]
    runs = planned(path.stem)
    assert {name: row["runs"] for name, row in stages.items()} == {
        name: sum(run.stage == name for run in runs) for name in dict.fromkeys(run.stage for run in runs)
    }
    assert all(row["minutes"] > 0 for row in stages.values())
    named = [needed(stages, row.stages) for row in ROWS if row.grid == path.stem]
    assert {stage for each in named for stage in each} == set(stages)


def test_rows_name_what_exists() -> None:
    grids = result("grid_minutes")["grids"]
    assert all(set(row.stages) <= set(grids[row.grid]) and row.stages for row in ROWS if row.grid)
    assert not [row for row in ROWS if not row.grid and row.stages]


def test_what_a_table_needs_is_counted_once() -> None:
    stages = {"a": {"needs": []}, "b": {"needs": ["a"]}, "c": {"needs": ["a", "b"]}}
    assert sorted(needed(stages, ("c", "b"))) == ["a", "b", "c"]
    assert needed(stages, ("a",)) == ["a"]
    assert [two_digits(value) for value in (0.6, 12.4, 1234.0, 98_765.0)] == ["1", "12", "1,200", "99,000"]


def test_trainings_by_hand() -> None:
    """Two branches of ONE count as two networks; its baseline is one; both are tested in every epoch."""
    work = trainings(planned("osakd"))
    taught, baseline = work["table2-branches-method=one-seed=0"]
    assert (taught.copies, baseline.copies, taught.teacher) == (2, 1, None)
    assert taught.schedule.epochs == 300
    assert taught.tests
    own, peer = work["table1-data=svhn-k=8-seed=0"]
    assert (own.spec, own.data, own.schedule.batch_size) == (peer.spec, "svhn", 64)


@pytest.mark.parametrize(
    ("grid", "stages", "schedule", "augment"),
    [
        ("self_distillation_setting", None, SCHEDULES["self-distillation"], "crop-flip-autoaugment"),
        ("osakd", ("table2", "table2-branches"), SCHEDULES["osakd-resnet"], "crop-flip"),
    ],
)
def test_tables_under_one_setting(grid: str, stages: tuple[str, ...] | None, schedule: Schedule, augment: str) -> None:
    """Every network of the table, teachers and baselines too, has the same schedule and augmentation."""
    runs, work = planned(grid), trainings(planned(grid))
    chosen = [run for run in runs if stages is None or run.stage in stages]
    assert {one.schedule for run in chosen for one in work[run.name]} == {schedule}
    assert {run.words[run.words.index("--augment") + 1] for run in chosen} == {augment}


def test_the_pruned_networks_had_the_same_training() -> None:
    """Fig. 6: the plain network has the schedule and augmentation of the preset that its rival has."""
    runs, work = planned("self_distillation_pruning"), trainings(planned("self_distillation_pruning"))
    found = {stage: {one.schedule for run in runs if run.stage == stage for one in work[run.name]} for stage in ROLES}
    assert found["self"] == found["plain"] == {self_distill.paper().schedule}
    plain = [run.words for run in runs if run.stage == "plain"]
    assert {words[words.index("--augment") + 1] for words in plain} == {self_distill.paper().augment}


def test_separability_has_four_classifiers() -> None:
    """Table 11 has four classifiers; with the kinds of Table 8, each run has a network of its own."""
    work = trainings(planned("self_distillation_studies"))
    assert len(work["separability-seed=0"][0].spec.exits) + 1 == 4
    kinds = {one.spec.exit_kind for name, few in work.items() if name.startswith("kind-") for one in few}
    assert kinds == {"attention", "aligned", "attention-se", "attention-cbam", "attention-bam"}


def test_seconds_by_hand() -> None:
    """A batch of 64: 45,000 images in 704 steps; 5,000 validation and 10,000 test images an epoch, forward only."""
    training = trainings(planned("osakd"))["table1-data=cifar10-k=8-seed=0"][0]
    known = {training.spec: {"train_s": 1.0, "update_s": 10.0, "forward_s": 0.5}}
    assert seconds(training, known) == pytest.approx(100 * (45_000 + 704 * 10 + 15_000 * 0.5))


def test_labels_tell_networks_apart() -> None:
    spec = Spec("resnet18", 10, (3, 32, 32))
    others = (Spec("resnet18", 10, (3, 32, 32), 0.5), Spec("resnet18", 10, (3, 32, 32), resolution=0.5))
    assert len({label(one) for one in (spec, *others)}) == 3
