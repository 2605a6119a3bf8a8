"""What each classifier of a network is worth for its multiply-adds, from evidence that was collected once.

Anytime: each exit's or width's accuracy against what it costs. Budgeted: images leave at the first exit that is sure
enough, and thresholds from the validation split keep the average within a budget (Huang et al., MSDNet, ICLR'18,
section 3; the family of exit shares is that of its public code).
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
"""Ratios of the geometric family: below 1 most images leave early, above 1 late."""


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of convolutions and linear layers for one image, for each classifier, weak to strong.

    `alone`: those of its logits and no others. `in_order`: those after all weaker classifiers have run, too; an exit
    goes on from where the last one stopped, a width begins anew.
    """

    alone: tuple[int, ...]
    in_order: tuple[int, ...]


def macs(model: nn.Module, shape: tuple[int, ...]) -> Macs:
    """Count every classifier of `model` for images of `shape` [C, H, W]; exact."""
    if isinstance(model, Slimmable):
        alone = tuple(multiply_adds(count(narrowed(model, i, shape), shape)) for i in range(len(model.widths)))
        return Macs(alone, tuple(accumulate(alone)))
    costs = exit_costs(trace(model, shape))
    return Macs(costs.macs, costs.macs_in_order)


def geometric_shares(ratios: Tensor, exits: int) -> Floats:
    """[P, exits] from `ratios` [P]: the share of images that leaves at exit k, proportional to ratio^k."""
    powers = ratios.double()[:, None] ** torch.arange(1, exits + 1, dtype=torch.float64)
    found: Floats = (powers / powers.sum(1, keepdim=True)).numpy()
    return found


def thresholds(confidence: Floats, shares: Floats) -> Floats:
    """[P, exits] confidences at or above which images leave, from `confidence` [N, exits] and `shares` [P, exits].

    At each exit the surest of the images that are left go, floor(N times its share) of them, and all whose confidence
    ties with the last of these. No image leaves at an exit whose share is less than one image; all leave at the last.
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
    """Thresholds above which images leave that have a confidence of at least `limits`, in which `Evidence` counts."""
    return np.nextafter(limits, -np.inf)


@dataclass(frozen=True)
class Budgeted:
    """One choice of thresholds, and its results on the validation split, by which it was chosen, and the test split.

    `macs` are averages an image; `shares` are the parts of the test images that leave at each exit.
    """

    thresholds: tuple[float, ...]
    validation_macs: float
    validation_accuracy: float
    macs: float
    accuracy: float
    shares: tuple[float, ...]


def budgeted(validation: Evidence, test: Evidence, in_order: Sequence[int], shares: Floats) -> list[Budgeted]:
    """Thresholds from `validation` for each row of `shares` [P, exits], applied to `test`."""
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
    """Of a fine geometric family, the thresholds with most validation accuracy at `budget` multiply-adds or fewer.

    `budget` is an average an image on the validation split; of equal accuracies the one that spends least is taken.
    Raises ShoalError below the first exit's cost.
    """
    if not in_order[0] <= budget < math.inf:
        raise ShoalError(f"found a budget of {budget:,.0f} MACs; need {in_order[0]:,}, the first exit's, or more")
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
    """One classifier: test accuracy in percent, and multiply-adds alone and with all weaker ones."""

    name: str
    accuracy: float
    macs: int
    macs_in_order: int


def anytime_rows(names: Sequence[str], found: Evidence, cost: Macs) -> list[AnytimeRow]:
    """A row for each classifier: its name, accuracy in percent, and multiply-adds alone and in order."""
    columns = zip(names, found.accuracies, cost.alone, cost.in_order, strict=True)
    return [AnytimeRow(name=n, accuracy=a, macs=alone, macs_in_order=order) for n, a, alone, order in columns]
