"""A method that lost against its baseline is said to have lost, below the table."""

from __future__ import annotations

import pytest

from shoal.cli import distill, exits, self_distill
from shoal.exits.records import Chosen, Single, Worth
from shoal.report.layout import Grid
from shoal.storage.summary import ExitRow, Figures, Summary


def summary(accuracy: float) -> Summary:
    sides = [Figures(accuracy=value, relus=100, macs=1000, params=10) for value in (90.0, accuracy)]
    return Summary("digits", "resnet10", 0, sides[0], sides[1], method="kd", classifiers=[accuracy, 80.0])


def taught(accuracy: float) -> Grid:
    return distill.table(summary(accuracy))


def self_taught(accuracy: float) -> Grid:
    found = summary(accuracy)
    found.after = ["relu"]
    found.exits = [ExitRow(accuracy=80.0, params=1, relus=1, macs=1, cascaded_macs=1)] * 2
    return self_distill.classifier_table(found)


def early(accuracy: float) -> Grid:
    worth = Worth(accuracy=accuracy, macs=500.0, shares=[0.5, 0.5])
    single = Single(accuracy=90.0, validation=90.0, macs=1000.0)
    body = Chosen(
        thresholds=[0.9], ensemble=False, method="grid", searched_on="val", goal={"loss": 0.0}, fitness=1.0,
        validation=worth, test=worth, full=single, exits=[single, single], ensemble_accuracy=90.0, uncounted=[],
        seconds={}, curve=[], lost=accuracy < 90.0,
    )  # fmt: skip
    return exits.exits_table("run", body)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (taught, "kd lost: 89.50 % test accuracy, against 90.00 % of the baseline."),
        (self_taught, "self-distillation lost: 89.50 % test accuracy, against 90.00 % of the baseline."),
        (early, "Early exits lost: 89.50 % test accuracy, against 90.00 % of the full network."),
    ],
)
def test_a_loss_is_one_sentence_below_the_table(table: object, sentence: str) -> None:
    assert callable(table)
    assert sentence in str(table(89.5).caption)
    assert "lost" not in str(table(90.0).caption)
