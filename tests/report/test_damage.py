"""Damaged and hostile run folders through the whole report command: one sentence, or text that stays text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.errors import ShoalError
from shoal.storage.run import Run
from tests.report.test_report import points_of
from tests.support.finished import finished

MARKUP, FORMULA = "[/b][link=x]", r"$\frac$"


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    run = Run(finished(folder, 500, 90.0))
    summary = run.read_json("summary.json")
    change(summary)
    run.write_json("summary.json", summary)
    return folder


def report(folder: Path, *words: str) -> str:
    """What the command prints with all of its files asked for."""
    files = [f"--{kind}={folder.parent / f'all.{kind}'}" for kind in ("html", "png", "csv")]
    done = CliRunner().invoke(app, ["report", str(folder), *files, *words], env={"COLUMNS": "300"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.mark.parametrize("text", [MARKUP, FORMULA])
@pytest.mark.parametrize("where", ["data", "model", "stage", "folder"])
def test_names_are_neither_markup_nor_formulas(where: str, text: str, tmp_path: Path) -> None:
    name = text.replace("/", "") if where == "folder" else "run"
    folder = edited(tmp_path / name, lambda s: s.update({where: text}) if where in s else None)
    if where == "stage":
        Run(folder).log(text, {"accuracy": 50.0})
    assert report(folder)
    assert (tmp_path / "all.png").stat().st_size > 0


BROKEN: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (lambda s: s["reduced"].update(relus=10**400), "finite number for 'relus'"),
    (lambda s: s["reduced"].update(replaced_blocks=None), "list of names for 'replaced_blocks'"),
    (lambda s: s["reduced"].update(replaced_blocks="layer1"), "list of names for 'replaced_blocks'"),
    (lambda s: s["reduced"].update(replaced_blocks=[5]), "list of names for 'replaced_blocks'"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=range(len(BROKEN)))
def test_damaged_summaries_get_one_sentence(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ShoalError, match=message):
        report(edited(tmp_path / "run", change))


def test_networks_without_relus_have_no_front_on_a_logarithmic_axis(tmp_path: Path) -> None:
    def linear(summary: dict[str, Any]) -> None:
        for side in ("baseline", "reduced"):
            summary[side]["relus"] = 0

    assert report(edited(tmp_path / "run", linear))


def test_what_was_chosen_by_another_budget_is_no_other_seed(tmp_path: Path) -> None:
    for seed, design in ((0, "S2"), (1, "S3")):
        folder = finished(tmp_path / str(seed), 500, 90.0, seed=seed)
        run = Run(folder)
        run.write_json("summary.json", run.read_json("summary.json") | {"design": design})
    found = points_of(tmp_path / "0", tmp_path / "1")
    assert [point.spread for point in found if point.side == "reduced"] == [None, None]
