"""Test accuracies of all epochs: beside the selection by validation, which they never change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.errors import ShoalError
from shoal.report.tables import comparison_table, remarks_on_tests
from shoal.storage.run import Run
from shoal.storage.summary import Figures, Summary
from shoal.sweep.results import remarks_on_tests as remarks_on_sweep
from shoal.training.evaluation import evaluate
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.on_test import on_test, row_of_tests
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.cli.test_commands import call
from tests.conftest import Residual, blobs

DATA = blobs(96)
PLAN = Schedule(3, 0.1, batch_size=16)


def rows(*accuracies: Sequence[float]) -> list[dict[str, float]]:
    return [{"epoch": i, "accuracy": 0.0, **row_of_tests(own)} for i, own in enumerate(accuracies)]


def test_largest_and_last_by_hand() -> None:
    """Three epochs of two classifiers; their means are 45, 50 and 45."""
    known = rows((20.0, 70.0), (40.0, 60.0), (30.0, 60.0))
    largest = {"largest_on_test": 70.0, "largest_on_test_epoch": 0, "last_on_test": 60.0}
    assert on_test(known) == largest
    assert on_test(known, 0, 0) == {"largest_on_test": 40.0, "largest_on_test_epoch": 1, "last_on_test": 30.0}
    # The epoch is that of the largest mean, also for a classifier that was better in another one.
    assert on_test(known, None, 1) == {"largest_on_test": 60.0, "largest_on_test_epoch": 1, "last_on_test": 60.0}
    assert on_test(rows((50.0,), (60.0,), (60.0,)))["largest_on_test_epoch"] == 1
    assert on_test([{"epoch": 0, "accuracy": 50.0}]) == on_test([]) == {}


def trained(settings: Settings) -> tuple[Any, dict[str, torch.Tensor], list[float]]:
    """The history and weights of a fit, and the test accuracy after each of its epochs."""
    torch.manual_seed(0)
    model, seen = Residual(), list[float]()

    class Judge:
        def on_epoch_end(self, model: torch.nn.Module, epoch: int) -> None:
            seen.append(evaluate(model, DATA, DATA.test)[-1])

    history = fit(model, DATA, Objective((cross_entropy(),)), PLAN, hooks=(Judge(),), settings=settings)
    return history, dict(model.state_dict()), seen


@pytest.mark.parametrize("select", ["val", "test"])
def test_the_test_set_is_evaluated_after_each_epoch_and_changes_nothing(select: str) -> None:
    settings = Settings(select=select)
    plain, weights, _ = trained(settings)
    history, again, seen = trained(replace(settings, test_every_epoch=True))
    assert [row["test_accuracy"] for row in history.rows] == seen
    assert history.on_test()["largest_on_test"] == max(seen)
    assert history.on_test()["last_on_test"] == seen[-1]
    assert plain.on_test() == {}
    assert (history.best, history.best_epoch) == (plain.best, plain.best_epoch)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    same = ("epoch", "lr", "accuracy", "cross_entropy", "loss")
    assert [[row.get(key) for key in same] for row in history.rows] == [
        [row.get(key) for key in same] for row in plain.rows
    ]


def test_tables_mark_what_was_selected_on_the_test_set() -> None:
    known = Figures(accuracy=60.0, largest_on_test=64.25, largest_on_test_epoch=3, last_on_test=62.5)
    summary = Summary("digits", "resnet9", 0, Figures(accuracy=50.0), known, environment=None)
    assert remarks_on_tests({"baseline": summary.baseline, "reduced": known}) == [
        "largest test accuracy of all epochs, selected on the test set, %: reduced 64.25",
        "test accuracy after the last epoch, %: reduced 62.50",
    ]
    assert "selected on the test set, %: reduced 64.25" in comparison_table(summary).caption
    assert remarks_on_tests({"baseline": Figures(accuracy=50.0), "other": None}) == []


SMALL = ("--data", "digits", "--limit", "200", "--epochs", "2", "--width", "0.05", "--test-every-epoch")


def logged(run: Path, stage: str, key: str = "test_accuracy") -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in lines if row["stage"] == stage]


def test_train_shows_them_and_records_that_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a short path leaves the table its width
    words = ("train", "resnet9", *SMALL, "--out", "run")
    text = " ".join(call(*words).split())
    assert "largest test accuracy of all epochs (selected on the test set), %" in text
    body = json.loads(call(*words, "--resume", "--json"))
    seen = logged(tmp_path / "run", "teacher")
    assert (body["largest_on_test"], body["last_on_test"]) == (max(seen), seen[-1])
    assert Run(tmp_path / "run").config()["test_every_epoch"] is True
    with pytest.raises(ShoalError, match="test_every_epoch"):
        call(*(word for word in words if word != "--test-every-epoch"), "--resume")
    call("train", "resnet9", *SMALL[:-1], "--out", str(tmp_path / "plain"))
    assert "test_every_epoch" not in Run(tmp_path / "plain").config()


@pytest.mark.parametrize(("method", "key"), [("osakd", "test_accuracy"), ("one", "test_accuracy_exit0")])
def test_distill_has_them_for_the_network_that_it_deploys(method: str, key: str, tmp_path: Path) -> None:
    """Table I of OSAKD reports the largest one. With branches, it is that of the branch that is kept."""
    text = call("distill", method, "resnet9", *SMALL, "--out", str(tmp_path))
    assert "selected on the test set, %: baseline" in " ".join(text.split())
    summary = Summary.read(Run(tmp_path))
    seen, plain = logged(tmp_path, "distill", key), logged(tmp_path, "baseline")
    assert (summary.reduced["largest_on_test"], summary.reduced["last_on_test"]) == (max(seen), seen[-1])
    assert summary.side("baseline")["largest_on_test"] == max(plain)


@pytest.mark.slow
def test_inplace_has_them_for_each_classifier_in_the_epoch_with_the_best_mean(tmp_path: Path) -> None:
    words = ("--width", "0.1", "--widths", "0.5,1", "--test-every-epoch", "--out", str(tmp_path))
    text = call("inplace", "resnet9", *SMALL[:6], *words)
    assert "selected on the test set, %: 0.5" in " ".join(text.split())
    found = Summary.read(Run(tmp_path)).classifiers
    assert isinstance(found, dict)
    narrow, wide = (logged(tmp_path, "inplace", key) for key in ("test_accuracy_exit0", "test_accuracy"))
    means = [a + b for a, b in zip(narrow, wide, strict=True)]
    epoch = means.index(max(means))
    assert [found[name]["largest_on_test"] for name in ("0.5", "1")] == [narrow[epoch], wide[epoch]]
    assert [found[name]["largest_on_test_epoch"] for name in ("0.5", "1")] == [epoch, epoch]
    assert [found[name]["last_on_test"] for name in ("0.5", "1")] == [narrow[-1], wide[-1]]


@pytest.mark.slow
def test_self_distill_has_them_for_the_final_classifier(tmp_path: Path) -> None:
    words = ("self-distill", "resnet9", *SMALL, "--kind", "aligned", "--out", str(tmp_path))
    assert "selected on the test set, %: plain network" in " ".join(call(*words).split())
    summary = Summary.read(Run(tmp_path))
    seen, plain = logged(tmp_path, "self-distillation"), logged(tmp_path, "baseline")
    assert summary.reduced["largest_on_test"] == max(seen)
    assert summary.side("baseline")["last_on_test"] == plain[-1]


def test_a_sweep_marks_what_is_selected_on_the_test_set() -> None:
    """Below the table of accuracies of the validation split's epoch; nothing for runs without these figures."""
    figures = {"reduced.accuracy": 60.0, "reduced.largest_on_test": 64.25, "reduced.last_on_test": 62.5}
    group = {"stage": "osakd", "axes": {"k": 8}, "seeds": [0, 1], "runs": 2, "sd": dict.fromkeys(figures, 0.5)}
    body: Any = {"groups": [group | {"mean": figures}]}
    assert remarks_on_sweep(body) == [
        "largest test accuracy of all epochs, selected on the test set, %: osakd: k 8: 64.25 ± 0.50",
        "test accuracy after the last epoch, %: osakd: k 8: 62.50 ± 0.50",
    ]
    plain: Any = {"groups": [group | {"mean": {"accuracy": 60.0}}]}
    assert remarks_on_sweep(plain) == []
