"""`summary.json`: what is written is read back, also what another version wrote, and who lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.errors import ShoalError
from shoal.storage.run import Run
from shoal.storage.summary import DesignRow, Figures, Summary


def summary(baseline: float = 90.0, reduced: float = 91.0) -> Summary:
    sides = [Figures(accuracy=value, relus=100, macs=1000) for value in (baseline, reduced)]
    return Summary("digits", "resnet10", 0, sides[0], sides[1], method="kd", classifiers=[reduced, 50.0])


def test_a_summary_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    summary().write(run)
    assert Summary.read(run).as_json() == json.loads((tmp_path / "summary.json").read_text())
    assert Summary.read(run).reduced == summary().reduced


def test_a_field_without_a_value_is_left_out() -> None:
    assert set(summary().as_json()) == {
        "data", "model", "seed", "baseline", "reduced", "environment", "method", "classifiers",
    }  # fmt: skip


def test_designs_without_a_budget_say_so() -> None:
    found = summary()
    found.designs = [DesignRow(name="S2", relus=1, validation=1.0, test=1.0, front=True, merging={})]
    assert found.as_json()["budget"] is None
    found.budget = 5
    assert found.as_json()["budget"] == 5


def test_what_another_version_wrote_stays(tmp_path: Path) -> None:
    run, body = Run(tmp_path), summary().as_json() | {"from_tomorrow": [1, 2]}
    run.write_json("summary.json", body)
    Summary.read(run).write(run)
    assert run.read_json("summary.json") == json.loads(json.dumps(body))


@pytest.mark.parametrize(("reduced", "lost"), [(89.99, True), (90.0, False), (90.01, False)])
def test_a_lower_accuracy_than_the_baselines_is_a_loss(reduced: float, lost: bool) -> None:
    found = summary(reduced=reduced)
    assert found.lost is lost
    said = f"kd lost: {reduced:.2f} % test accuracy, against 90.00 % of the baseline."
    assert found.verdict("kd") == (said if lost else None)


@pytest.mark.parametrize("body", [{}, [], {"data": "digits", "model": 1}])
def test_another_file_is_refused(body: object, tmp_path: Path) -> None:
    Run(tmp_path).write_json("summary.json", body)
    with pytest.raises(ShoalError, match="found no data, model, seed, baseline, reduced in"):
        Summary.read(Run(tmp_path))
