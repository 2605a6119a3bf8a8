"""Anytime and budgeted evaluation: counts against networks cut to size, thresholds against a plain loop, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shoal.channels.slimmable import narrowed, slimmable
from shoal.data.dataset import Split
from shoal.errors import ShoalError
from shoal.exits.anytime import (
    FAMILY,
    anytime_rows,
    budgeted,
    geometric_shares,
    macs,
    strict,
    thresholds,
    within,
)
from shoal.exits.classifiers import add_exits, keep_exit
from shoal.exits.evidence import Evidence, Floats, collect
from shoal.models import build
from shoal.surgery.tracing import count
from shoal.training.evaluation import evaluate
from shoal.training.settings import Settings
from tests.conftest import Residual, blobs, randomise

SHAPE = (1, 8, 8)
DATA = blobs(32)


def total(model: nn.Module, shape: tuple[int, ...]) -> int:
    counted = count(model, shape)
    return counted.macs + counted.linear_macs


@pytest.mark.slow
def test_macs_of_exits() -> None:
    """Alone, an exit costs what the network cut there costs; the last one in order what the whole network does."""
    model = build("msdnet-5", 4, channels=1, width=0.25)
    found = macs(model, SHAPE)
    assert found.alone == tuple(total(keep_exit(model, i), SHAPE) for i in range(5))
    assert found.in_order[0] == found.alone[0]
    assert found.in_order[-1] == total(model, SHAPE)
    assert list(found.in_order) == sorted(found.in_order)
    assert all(a > b for a, b in zip(found.in_order[1:], found.alone[1:], strict=True))


def test_macs_of_exits_by_hand() -> None:
    """An exit after the stem: 4 3x3 filters on 8x8 of one channel; its own 3x3 of 4 to 4 on 4x4, and 4 x 4 linear."""
    model = add_exits(Residual(), ["relu"], 4, SHAPE)
    stem, exit = 64 * 4 * 9, 16 * 4 * 4 * 9 + 16
    assert macs(model, SHAPE).alone[0] == stem + exit
    assert macs(model, SHAPE).alone[1] == total(Residual(), SHAPE)
    assert macs(model, SHAPE).in_order[1] == total(Residual(), SHAPE) + exit


def test_macs_of_widths() -> None:
    slim = slimmable(Residual(), SHAPE, (0.25, 0.5, 1.0))
    found = macs(slim, SHAPE)
    assert found.alone == tuple(total(narrowed(slim, i, SHAPE), SHAPE) for i in range(3))
    assert found.in_order == (found.alone[0], found.alone[0] + found.alone[1], sum(found.alone))


def test_collected_evidence_has_the_accuracy_that_evaluation_finds() -> None:
    model = randomise(build("msdnet-5", 4, channels=1, width=0.25)).train()
    found = collect(model, DATA, DATA.test, Settings(), 7)
    assert model.training
    assert found.confidence.shape == found.right.shape == (32, 5)
    assert found.accuracies == pytest.approx(evaluate(model, DATA, DATA.test))
    rows = anytime_rows(("1", "2", "3", "4", "5"), found, macs(model, SHAPE))
    assert tuple(row["accuracy"] for row in rows) == found.accuracies
    assert [row["macs_in_order"] for row in rows] == list(macs(model, SHAPE).in_order)


def test_geometric_shares_by_hand() -> None:
    found = geometric_shares(torch.tensor([1.0, 0.5, 2.0]), 3)
    truth = np.array([[1, 1, 1], [1, 0.5, 0.25], [1, 2, 4]])
    assert np.allclose(found, truth / truth.sum(1, keepdims=True))


def confident(confidence: Floats) -> Evidence:
    return Evidence(confidence, confidence > 0.5, confidence[:, 0] > 0.5)


def by_loop(confidence: Floats, shares: list[float]) -> tuple[list[float], list[int]]:
    """The public code's way for one row of shares: count the surest images that are left, one by one."""
    number, exits = confidence.shape
    limits, left, leaves = [math.inf] * exits, set(range(number)), [exits - 1] * number
    for k in range(exits - 1):
        ranked = sorted(left, key=lambda i: -float(confidence[i, k]))
        wanted = math.floor(number * shares[k])
        if wanted:
            limits[k] = float(confidence[ranked[wanted - 1], k])
        for i in [i for i in left if float(confidence[i, k]) >= limits[k]]:
            leaves[i] = k
            left.discard(i)
    limits[-1] = -math.inf
    return limits, leaves


@pytest.mark.parametrize("exits", [2, 3, 7])
def test_thresholds_against_a_plain_loop(exits: int) -> None:
    evidence = confident(np.random.default_rng(exits).random((83, exits)))
    shares = geometric_shares(torch.tensor(FAMILY), exits)
    for row, limits in zip(shares.tolist(), thresholds(evidence.confidence, shares), strict=True):
        leaves = evidence.leaves_at(strict(limits))
        assert (limits.tolist(), leaves.tolist()) == by_loop(evidence.confidence, row)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 1000), st.floats(0.05, 20))
def test_laws_of_thresholds(count: int, exits: int, seed: int, ratio: float) -> None:
    """Every image leaves once; as many at each exit as its share says, or more where confidences tie."""
    evidence = confident(np.round(np.random.default_rng(seed).random((count, exits)) * 8) / 8)
    shares = geometric_shares(torch.tensor([ratio]), exits)
    leaves = evidence.leaves_at(strict(thresholds(evidence.confidence, shares))[0])
    assert leaves.shape == (count,)
    early = [int((leaves <= k).sum()) for k in range(exits)]
    wanted = [sum(math.floor(count * s) for s in shares[0, : k + 1].tolist()) for k in range(exits - 1)]
    assert all(a >= b for a, b in zip(early[:-1], wanted, strict=True))
    assert early[-1] == count


# Four images, two classifiers, two classes. The first is sure and right, sure and wrong, unsure and wrong, unsure and
# right; the second is right but for the last image.
LOGITS = torch.tensor(
    [
        [[4.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.5, 0.0]],
        [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]],
    ]
)
LABELS = torch.tensor([0, 1, 1, 0])
HAND = Evidence.of(list(LOGITS), LABELS)


def test_a_budget_by_hand() -> None:
    assert HAND.accuracies == (50.0, 75.0)
    rows = budgeted(HAND, HAND, (10, 30), np.array([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]))
    assert [row.macs for row in rows] == [25, 20, 10, 30]
    assert [row.accuracy for row in rows] == [75, 50, 50, 75]
    assert [row.shares for row in rows] == [(0.25, 0.75), (0.5, 0.5), (1, 0), (0, 1)]
    assert [row.validation_accuracy for row in rows] == [75, 50, 50, 75]
    limit = 1 / (1 + math.exp(-4))
    assert rows[0].thresholds == (pytest.approx(limit), -math.inf)
    assert rows[3].thresholds[0] == math.inf


def test_leaving_at_or_above_a_limit_is_leaving_strictly_above_the_number_below_it() -> None:
    limits = np.array([[0.5, -np.inf], [np.inf, -np.inf], [0.0, -np.inf]])
    confidence = np.array([0.0, np.nextafter(0.5, 0), 0.5, 1.0])
    assert np.array_equal(confidence > strict(limits)[:, :1], confidence >= limits[:, :1])


@pytest.mark.parametrize(("budget", "spent", "accuracy"), [(10, 10, 50), (24, 10, 50), (25, 25, 75), (99, 25, 75)])
def test_the_best_within_a_budget(budget: float, spent: float, accuracy: float) -> None:
    """Equal accuracy goes to fewer multiply-adds, so the whole 30 are never spent."""
    found = within(budget, HAND, HAND, (10, 30))
    assert (found.validation_macs, found.accuracy) == (spent, accuracy)


def test_thresholds_come_from_validation_alone() -> None:
    other = Evidence.of(list(LOGITS.flip(0) * 3), LABELS)
    a, b = (budgeted(HAND, test, (10, 30), np.array([[0.5, 0.5]]))[0] for test in (HAND, other))
    assert a.thresholds == b.thresholds
    assert (a.validation_macs, a.validation_accuracy) == (b.validation_macs, b.validation_accuracy)
    assert a.accuracy != b.accuracy


def test_must_fail() -> None:
    with pytest.raises(ShoalError, match="found a budget of 9 MACs; need 10"):
        within(9, HAND, HAND, (10, 30))
    empty = Split(DATA.test.images[:0], DATA.test.labels[:0])
    with pytest.raises(ShoalError, match="found an empty split"):
        collect(Residual(), DATA, empty, Settings())
