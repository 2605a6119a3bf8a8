"""What a report accepts: teachers alone, sweeps; and how each run was made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import ShoalError
from shoal.jobs import report as commands
from shoal.jobs.inspect import Evaluation, evaluate
from shoal.jobs.report import Asked
from shoal.networks.assembly import assemble
from shoal.networks.stored import save_network
from shoal.report.tables import facts as made
from shoal.storage.run import Run
from shoal.storage.summary import Figures, Summary, write_alone
from tests.report.test_report import page_data, points_of, rendered
from tests.support.finished import BASE, SMALL, finished


def alone(folder: Path, accuracy: float = 93.0, seed: int = 0, **config: Any) -> Path:
    """A run of a teacher, with the figures of its one network."""
    run = Run.create(folder, {"command": "train", "data": "digits", "seed": seed, **config})
    write_alone(run, "digits", "resnet10", Figures(**BASE | {"accuracy": accuracy, "test_images": 360}))  # type: ignore[typeddict-item]
    return folder


def test_a_teacher_alone_is_a_report(tmp_path: Path) -> None:
    folder = alone(tmp_path / "teacher")
    (point,) = points_of(folder)
    assert (point.label, point.side, point.accuracy, point.images) == (str(folder), "baseline", 93.0, 360)
    run = page_data(rendered(folder))["runs"][0]
    assert run["alone"]
    assert ["ReLUs", "11,264", "", ""] in run["comparison"]
    row = commands.report([folder], Asked())[0]
    assert (row["baseline.accuracy"], row["reduced.accuracy"], row["test_images"]) == (93.0, None, 360)
    assert "93.00" in commands.report_table([row]).rows[0]


def test_a_teacher_beside_its_reduction_is_one_point(tmp_path: Path) -> None:
    reduced = finished(tmp_path / "reduced", 500, 90.0)
    for accuracy, names in ((BASE["accuracy"], ["all ReLUs"]), (93.0, ["all ReLUs", "teacher"])):
        teacher = alone(tmp_path / str(accuracy) / "teacher", accuracy)
        found = [p for p in points_of(teacher, reduced) if p.side == "baseline"]
        assert sorted(re.split(r", |/", p.label)[-1] for p in found) == names


def test_teachers_with_other_settings_are_not_seeds_of_one(tmp_path: Path) -> None:
    for epochs, spreads in (("1", 1), ("9", 2)):
        folders = [alone(tmp_path / epochs / str(s), 90.0 + s, s, epochs=e) for s, e in ((0, "1"), (1, epochs))]
        assert len(points_of(*folders)) == spreads


def test_a_sweep_stands_for_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep"
    alone(sweep / "runs" / "teacher")
    finished(sweep / "runs" / "reduced", 500, 90.0)
    Run.create(sweep / "runs" / "stopped", {"command": "train", "data": "digits", "seed": 0})
    (sweep / "grid.json").write_text(json.dumps({name: [] for name in ("reduced", "teacher", "stopped", "later")}))
    rows = commands.report([sweep, sweep / "runs" / "reduced"], Asked())
    assert [Path(row["run"]).name for row in rows] == ["reduced", "teacher"]
    said = re.sub(r"\s+", "", capsys.readouterr().err)
    assert said.count("leftout") == 1
    assert "stopped" in said


FACTS = {
    "date": "2026-01-02T03:04:05+00:00",
    "packages": {"shoal": "9.9"},
    "processor": "EPYC",
    "cores": 2,
    "gpu": None,
}
MADE = [
    (FACTS, ("2026-01-02 03:04 UTC", "9.9", "EPYC, 2 cores")),
    (FACTS | {"gpu": "H200"}, ("2026-01-02 03:04 UTC", "9.9", "H200, EPYC, 2 cores")),
    ({"date": "soon", "packages": []}, ("soon", "not stored", "not stored")),
    (["no", "names"], ("not stored", "not stored", "not stored")),
    ({"date": 5, "packages": {"shoal": None}, "cores": "many"}, ("not stored", "not stored", "not stored")),
]


@pytest.mark.parametrize(("environment", "said"), MADE)
def test_every_run_says_how_it_was_made(environment: Any, said: tuple[str, ...], tmp_path: Path) -> None:
    run = Run(finished(tmp_path / "run", 500, 90.0))
    run.write_json("summary.json", run.read_json("summary.json") | {"environment": environment})
    facts = dict(page_data(rendered(run.folder))["runs"][0]["facts"])
    assert tuple(facts[name] for name in ("date", "version of shoal", "machine")) == said
    assert (facts["test images (n)"], facts["seed"]) == ("not stored", "0")


def test_a_new_run_stores_what_the_report_shows() -> None:
    summary = Summary("digits", "resnet10", 0, Figures(accuracy=1.0, test_images=7), Figures(accuracy=1.0))
    found = made(summary)
    assert found["test_images"] == 7
    assert None not in found.values()


def test_evaluation_stores_the_figures_that_a_teacher_lacks(tmp_path: Path) -> None:
    run = Run.create(tmp_path, {"command": "train", "data": "digits", "seed": 0, "limit": None, "data_dir": None})
    save_network(run, SMALL, assemble(SMALL))
    with pytest.raises(ShoalError, match="shoal evaluate RUN stores"):
        commands.report([tmp_path], Asked())
    found = evaluate(Evaluation(tmp_path))
    row = commands.report([tmp_path], Asked())[0]
    assert (row["baseline.accuracy"], row["test_images"]) == (found["accuracy"], found["test_images"])
    before = (tmp_path / "figures.json").read_text()
    evaluate(Evaluation(tmp_path))
    assert (tmp_path / "figures.json").read_text() == before
