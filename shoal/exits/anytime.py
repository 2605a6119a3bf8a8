"""Accuracy against cost for every classifier of a network, from logits that were computed once.

Anytime: the accuracy of each exit or width against its multiply-adds. Budgeted: each image leaves at the first exit
that is confident enough, with thresholds from the validation split that keep the average cost within a budget (Huang et
al., MSDNet, ICLR'18, section 3). The fractions of images per exit follow the geometric family of MSDNet's public code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from shoal.channels.slimmable import Slimmable, narrowed
from shoal.errors import ShoalError
from shoal.exits.evidence import Evidence, Floats
from shoal.exits.figures import exit_costs, multiply_adds
from shoal.exits.thresholds import Goal
from shoal.surgery.tracing import count, trace

FAMILY = tuple(step / 20 for step in range(1, 40))
"""Ratios of the geometric family. Below 1, most images leave at early exits; above 1, at late exits."""


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of convolutions and linear layers for one image, one entry per classifier, weakest first.

    `alone` counts what one classifier needs by itself. `in_order` also counts all weaker classifiers: an exit continues
    from the features of the exit before it, whereas each width starts again from the image.
    """

    alone: tuple[int, ...]
    in_order: tuple[int, ...]


def macs(model: nn.Module, shape: tuple[int, ...]) -> Macs:
    """Count the multiply-adds of every classifier of `model` for images of `shape` [C, H, W]."""
    if isinstance(model, Slimmable):
        alone = tuple(multiply_adds(count(narrowed(model, i, shape), shape)) for i in range(len(model.widths)))
        return Macs(alone, tuple(accumulate(alone)))
    costs = exit_costs(trace(model, shape))
    return Macs(costs.macs, costs.macs_in_order)


def geometric_shares(ratios: Tensor, exits: int) -> Floats:
    """Fractions of images per exit [P, exits] (float64) from `ratios` [P].

    The fraction at exit k (counted from 1) is proportional to ratio^k.
    """
    powers = ratios.double()[:, None] ** torch.arange(1, exits + 1, dtype=torch.float64)
    found: Floats = (powers / powers.sum(1, keepdim=True)).numpy()
    return found


def thresholds(confidence: Floats, shares: Floats) -> Floats:
    """Thresholds [P, exits] for `confidence` [N, exits] and wanted fractions `shares` [P, exits]; float64.

    An image leaves where its confidence is at least the threshold. At each exit, the floor(N * share) most confident of
    the remaining images leave, and so do images whose confidence equals the lowest of these. If a share is less than
    one image, no image leaves there. All remaining images leave at the last exit.
    """
    count, exits = confidence.shape
    wanted = np.floor(count * shares).astype(np.int64)
    found = np.full(shares.shape, np.inf)
    left = np.ones((len(shares), count), dtype=bool)
    for k in range(exits - 1):
        own = np.where(left, confidence[:, k], -np.inf)
        ranked = -np.sort(-own, axis=1)
        last = np.take_along_axis(ranked, (wanted[:, k, None] - 1).clip(0), axis=1)[:, 0]
        found[:, k] = np.where(wanted[:, k] > 0, last, np.inf)
        left &= own < found[:, k, None]
    found[:, -1] = -np.inf
    return found


def strict(limits: Floats) -> Floats:
    """The next smaller floats, because `Evidence` compares by ``>``.

    ``confidence > strict(limits)`` means ``confidence >= limits``.
    """
    return np.nextafter(limits, -np.inf)


@dataclass(frozen=True)
class Budgeted:
    """Thresholds chosen on the validation split, with their results on the validation and the test split.

    `validation_macs` and `macs` are averages per image, accuracies are in percent, and `shares` are the fractions of
    test images that leave at each exit.
    """

    thresholds: tuple[float, ...]
    validation_macs: float
    validation_accuracy: float
    macs: float
    accuracy: float
    shares: tuple[float, ...]


def budgeted(validation: Evidence, test: Evidence, in_order: Sequence[int], shares: Floats) -> list[Budgeted]:
    """For each row of `shares` [P, exits], choose thresholds on `validation` and apply them to `test`.

    `in_order` are the multiply-adds of an image that leaves at each exit.
    """
    return _applied(thresholds(validation.confidence, shares), validation, test, in_order)


def _applied(limits: Floats, validation: Evidence, test: Evidence, in_order: Sequence[int]) -> list[Budgeted]:
    means = []
    for split in (validation, test):
        accuracy, price = split.outcomes(strict(limits), in_order)
        means += [price.tolist(), accuracy.tolist()]
    shares = [test.shares(row) for row in strict(limits)]
    rows = zip(limits.tolist(), *means, shares, strict=True)
    return [Budgeted(tuple(row[0]), *row[1:]) for row in rows]


def within(budget: float, validation: Evidence, test: Evidence, in_order: Sequence[int]) -> Budgeted:
    """The thresholds with the highest validation accuracy whose average cost on `validation` is at most `budget`.

    `budget` is in multiply-adds per image. The candidates are a fine geometric family; among equal accuracies the
    cheapest wins. Raises ShoalError when the budget is below the cost of the first exit.
    """
    if not in_order[0] <= budget < math.inf:
        raise ShoalError(f"found a budget of {budget:,.0f} MACs; need {in_order[0]:,} or more to reach an exit")
    exits = len(in_order)
    at_once = np.eye(1, exits)  # all leave at the first exit
    shares = np.concatenate([at_once, geometric_shares(torch.logspace(-3, 3, 241), exits)])
    limits = thresholds(validation.confidence, shares)
    accuracy, price = validation.outcomes(strict(limits), in_order)
    cheapest = np.argsort(price, kind="stable")
    goal = Goal(float(in_order[-1]), validation.accuracies[-1], budget=budget)
    best = cheapest[goal.fittest(accuracy[cheapest], price[cheapest])]
    return _applied(limits[[best]], validation, test, in_order)[0]


class AnytimeRow(TypedDict):
    """One classifier: test accuracy in percent, and multiply-adds alone and including all weaker classifiers."""

    name: str
    accuracy: float
    macs: int
    macs_in_order: int


def anytime_rows(names: Sequence[str], found: Evidence, cost: Macs) -> list[AnytimeRow]:
    """One row per classifier: name, accuracy in percent, multiply-adds alone and in order."""
    columns = zip(names, found.accuracies, cost.alone, cost.in_order, strict=True)
    return [AnytimeRow(name=n, accuracy=a, macs=alone, macs_in_order=order) for n, a, alone, order in columns]
