"""What each classifier of a network is worth for its multiply-adds, from logits that were stored once.

Anytime: each exit's or width's accuracy against what it costs. Budgeted: images leave at the first exit that is sure
enough, and thresholds from the validation split keep the average within a budget (Huang et al., MSDNet, ICLR'18,
section 3; the family of exit shares is that of its public code).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from shoal.channels.slimmable import Slimmable, narrowed
from shoal.data.dataset import Dataset, Split
from shoal.errors import ShoalError
from shoal.exits.costs import exit_costs, multiply_adds
from shoal.exits.evidence import stored_logits
from shoal.surgery.tracing import count, trace
from shoal.training.settings import Settings

FAMILY = tuple(step / 20 for step in range(1, 40))
"""Ratios of the geometric family: below 1 most images leave early, above 1 late."""


@dataclass(frozen=True)
class Stored:
    """`logits` [classifiers, N, classes], weak to strong, of N images, and their `labels` [N]."""

    logits: Tensor
    labels: Tensor

    @property
    def accuracy(self) -> list[float]:
        """Percent right, of each classifier."""
        return [100.0 * float(right) for right in self._right.double().mean(1)]

    @property
    def confidence(self) -> Tensor:
        """Largest softmax probability [classifiers, N]."""
        return self.logits.softmax(2).amax(2)

    @property
    def _right(self) -> Tensor:
        return self.logits.argmax(2) == self.labels

    def right_at(self, leaves: Tensor) -> Tensor:
        """Whether each image is right at the classifier at which it leaves; `leaves` and the result are [..., N]."""
        right = self._right.expand(*leaves.shape[:-1], *self._right.shape)
        return right.gather(-2, leaves.unsqueeze(-2)).squeeze(-2)


def store(
    model: nn.Module, data: Dataset, split: Split, settings: Settings | None = None, batch_size: int = 500
) -> Stored:
    """The logits of every classifier of `model` on `split`, as `stored_logits` gives them."""
    found = stored_logits(model, data, split, settings or Settings(), batch_size)
    return Stored(torch.stack(found), split.labels.cpu())


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one image, convolutions and linear layers, for each classifier, weak to strong.

    `alone`: for its logits and no others. `in_order`: when all weaker ones have been asked before; exits go on from
    where the last one stopped, widths begin anew.
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


def geometric_shares(ratios: Tensor, exits: int) -> Tensor:
    """[P, exits] from `ratios` [P]: the share of images that leaves at exit k, proportional to ratio^k."""
    powers = ratios.double()[:, None] ** torch.arange(1, exits + 1, dtype=torch.float64)
    return powers / powers.sum(1, keepdim=True)


def thresholds(confidence: Tensor, shares: Tensor) -> Tensor:
    """[P, exits] confidences at or above which images leave, by those of the exits [exits, N] and `shares` [P, exits].

    At each exit the surest of the images that are left go, floor(N times its share) of them, and all whose confidence
    ties with the last of these. Nobody leaves at an exit whose share is less than one image; all do at the last one.
    """
    exits, count = confidence.shape
    wanted = (count * shares).floor().long()
    found = torch.full(shares.shape, torch.inf, dtype=confidence.dtype)
    left = torch.ones(len(shares), count, dtype=torch.bool)
    for k in range(exits - 1):
        own = confidence[k].where(left, -torch.inf)
        ranked = own.sort(1, descending=True).values
        last = ranked.gather(1, (wanted[:, k] - 1).clamp_min(0)[:, None])[:, 0]
        found[:, k] = last.where(wanted[:, k] > 0, torch.inf)
        left &= own < found[:, k, None]
    found[:, -1] = -torch.inf
    return found


def leaving(confidence: Tensor, limits: Tensor) -> Tensor:
    """[P, N]: the first exit whose confidence [exits, N] reaches its threshold in `limits` [P, exits]."""
    return (confidence >= limits[:, :, None]).int().argmax(1)


@dataclass(frozen=True)
class Budgeted:
    """One choice of thresholds, and what came of it: on the validation split that it was chosen by, and on the test's.

    `macs` are averages an image; `shares` are the parts of the test images that leave at each exit.
    """

    thresholds: tuple[float, ...]
    validation_macs: float
    validation_accuracy: float
    macs: float
    accuracy: float
    shares: tuple[float, ...]


def budgeted(validation: Stored, test: Stored, in_order: tuple[int, ...], shares: Tensor) -> list[Budgeted]:
    """Thresholds from `validation` for each row of `shares` [P, exits], applied to `test`."""
    limits = thresholds(validation.confidence, shares)
    price = torch.tensor(in_order, dtype=torch.float64)
    tried = [leaving(split.confidence, limits) for split in (validation, test)]
    means = [
        value.tolist()
        for split, leaves in zip((validation, test), tried, strict=True)
        for value in (price[leaves].mean(1), 100 * split.right_at(leaves).double().mean(1))
    ]
    parts = torch.stack([(tried[1] == k).double().mean(1) for k in range(len(in_order))], 1).tolist()
    rows = zip(limits.tolist(), *means, parts, strict=True)
    return [Budgeted(tuple(row[0]), row[1], row[2], row[3], row[4], tuple(row[5])) for row in rows]


def within(budget: float, validation: Stored, test: Stored, in_order: tuple[int, ...]) -> Budgeted:
    """Of a fine geometric family, the thresholds with most validation accuracy at `budget` multiply-adds or fewer.

    `budget` is an average an image on the validation split. Raises ShoalError below the first exit's cost.
    """
    if not in_order[0] <= budget < math.inf:
        raise ShoalError(f"found a budget of {budget:,.0f} MACs; need {in_order[0]:,}, the first exit's, or more")
    exits = len(in_order)
    first = torch.eye(exits, dtype=torch.float64)[:1]  # all leave at once
    shares = torch.cat([first, geometric_shares(torch.logspace(-3, 3, 241), exits)])
    found = [row for row in budgeted(validation, test, in_order, shares) if row.validation_macs <= budget]
    return max(found, key=lambda row: (row.validation_accuracy, -row.validation_macs))


def anytime_rows(names: tuple[str, ...], stored: Stored, cost: Macs) -> list[dict[str, Any]]:
    """A row for each classifier: its name, accuracy in percent, and multiply-adds alone and in order."""
    columns = zip(names, stored.accuracy, cost.alone, cost.in_order, strict=True)
    return [{"name": n, "accuracy": a, "macs": alone, "macs_in_order": order} for n, a, alone, order in columns]
