"""`shoal inplace` and `shoal anytime` from the command line, on embedded data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.channels.slimmable import Slimmable
from shoal.cli.app import app
from shoal.errors import ShoalError
from shoal.networks.stored import load_network
from shoal.report import read
from shoal.storage.run import Run


def call(*words: str) -> str:
    done = CliRunner().invoke(app, [*words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def words(out: Path, model: str, *more: str) -> list[str]:
    shared = ["--data", "digits", "--width", "0.125", "--epochs", "1", "--limit", "200", "--out", str(out)]
    return ["inplace", model, *shared, *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    widths = ["--widths", "0.25,0.5,0.75,1", "--sandwich", "2", "--preset", "slimmable-code"]
    exits = ["--exit", "layer2.0.relu2", "--exit", "relu"]
    asked = {
        "exits": words(folder / "exits", "resnet10", *exits),
        "widths": words(folder / "widths", "resnet10", *widths),
    }
    return {name: (folder / name, json.loads(call(*line, "--json"))) for name, line in asked.items()}


NAMES = {"exits": ["1", "2", "3"], "widths": ["0.25", "0.5", "0.75", "1"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_a_run_for_every_classifier(runs: dict[str, tuple[Path, dict[str, Any]]], kind: str) -> None:
    out, body = runs[kind]
    assert list(body["classifiers"]) == [row["name"] for row in body["anytime"]] == NAMES[kind]
    for row in body["anytime"]:
        own = json.loads(call("evaluate", str(out / kind / row["name"]), "--json"))
        assert own["accuracy"] == pytest.approx(row["accuracy"])
        assert own["macs"] + own["linear_macs"] == row["macs"]
    whole = json.loads(call("evaluate", str(out), "--json"))
    assert whole["accuracy"] == pytest.approx(body["anytime"][-1]["accuracy"])
    record = read(out)
    assert record is not None
    assert record.summary.baseline["macs"] > record.summary.reduced["macs"]
    assert all((out / name).stat().st_size > 1000 for name in ("curves.png", "anytime.png"))


def test_all_widths_stay_one_network(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    spec, model = load_network(Run(runs["widths"][0]), "slimmable")
    assert isinstance(model, Slimmable)
    assert spec.shared_affine
    assert spec.kept_width is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_budgets_from_the_command_line(runs: dict[str, tuple[Path, dict[str, Any]]], kind: str) -> None:
    out, body = runs[kind]
    costs = [row["macs_in_order"] for row in body["anytime"]]
    budget = (costs[0] + costs[1]) / 2
    again = json.loads(call("anytime", str(out), "--budget", f"{costs[0]},{budget}", "--json"))
    assert again["anytime"] == body["anytime"]
    assert json.loads((out / "anytime.json").read_text()) == again
    first, second = again["budgets"]
    assert first["validation_macs"] == costs[0]
    assert first["accuracy"] == pytest.approx(body["anytime"][0]["accuracy"])
    assert second["validation_macs"] <= budget
    assert second["validation_accuracy"] >= first["validation_accuracy"]
    assert len(again["budgeted"]) == 39
    assert all(len(row["thresholds"]) == len(costs) - 1 for row in again["budgeted"])
    shown = call("anytime", str(out), "--budget", str(budget))
    assert "budget" in shown
    with pytest.raises(ShoalError, match="found a budget of 1 MACs"):
        call("anytime", str(out), "--budget", "1")


def test_bad_input_gets_one_sentence_and_writes_nothing(
    runs: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    rows = [
        (words(out, "resnet10"), "found one classifier in 'resnet10'"),
        (words(out, "resnet10", "--widths", "half"), "found --widths"),
        (words(out, "msdnet-5", "--widths", "0.5,1"), "found concat at"),
        (words(out, "resnet10", "--widths", "0.5,1", "--exit", "relu"), "found widths and exits"),
        (words(out, "resnet10", "--exit", "relu", "--preset", "slimmable-code"), "without widths"),
        (words(out, "resnet10", "--exit", "relu", "--preset", "best"), "found preset 'best'"),
        (words(out, "resnet10", "--exit", "relu", "--method", "best"), "found method 'best'"),
        (words(runs["exits"][0], "resnet10", "--exit", "relu"), "found a run"),
        (words(runs["exits"][0], "resnet10", "--exit", "relu", "--resume"), "same configuration"),
        (["anytime", str(runs["exits"][0] / "exits" / "1")], "found one classifier at"),
    ]
    for line, message in rows:
        with pytest.raises(ShoalError, match=message):
            call(*line)
        assert not out.exists()


@pytest.mark.usefixtures("epochwise")
def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    line = words(tmp_path / "run", "resnet10", "--widths", "0.5,1", "--max-seconds", "0")
    line[line.index("--epochs") + 1] = "2"
    with pytest.raises(ShoalError, match="time is up"):
        call(*line)
    assert len(json.loads(call(*line, "--resume", "--json"))["anytime"]) == 2
