"""Classifiers that teach each other during training: which one learns from which, and with what weight in each epoch.

The terms of deep mutual learning (Zhang et al., CVPR'18), ONE (Lan et al., NeurIPS'18) and feature fusion learning (Kim
et al., ICPR'20) are sums of divergences between classifiers of one `Outputs`. No gradient reaches a teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.distillation.losses import kl_divergence
from shoal.distillation.paths import Lessons
from shoal.errors import ShoalError
from shoal.outputs import Outputs
from shoal.training.objective import Term, Weight, cross_entropy


def sigmoid_ramp(until: float) -> Callable[[int], float]:
    """A term's weight that rises from exp(-5) to 1 over the first `until` epochs.

    exp(-5 (1 - epoch / until)^2) (Laine and Aila, ICLR'17), as in ONE and FFL. Raises ShoalError unless `until` is
    positive.
    """
    if not until > 0:
        raise ShoalError(f"found a ramp over {until} epochs; need more than 0; leave the ramp out for none")
    return lambda epoch: math.exp(-5 * (1 - min(1.0, epoch / until)) ** 2)


def each_other(count: int) -> Lessons:
    """Each of `count` classifiers learns from all others, by the mean of the divergences (DML)."""
    return {i: {j: 1 / (count - 1) for j in range(count) if j != i} for i in range(count)}


def below(count: int) -> Lessons:
    """Each of `count` classifiers learns from classifier `count`, which combines them."""
    return {i: {count: 1.0} for i in range(count)}


def lessons_of(table: Lessons, temperature: float = 1.0, weight: Weight = 1.0, name: str = "mutual") -> Term:
    """The weighted sum of divergences KL(teacher || student), times the squared temperature.

    `table` maps each student (an exit) to its teachers (exits of the same network) and their weights.
    """

    def loss(student: Outputs, _: Outputs | None, labels: Tensor) -> Tensor:
        z = student.logits
        return torch.stack(
            [part * kl_divergence(z[j], z[i], temperature) for i, row in table.items() for j, part in row.items()]
        ).sum()

    return Term(name, weight, loss)


def from_mean(
    pupil: int, members: Sequence[int], temperature: float = 1.0, weight: Weight = 1.0, name: str = "ensemble"
) -> Term:
    """Classifier `pupil` learns from the mean of the logits of `members` (FFL)."""

    def loss(student: Outputs, _: Outputs | None, labels: Tensor) -> Tensor:
        mean = torch.stack([student.logits[i].detach().float() for i in members]).mean(0)
        return kl_divergence(mean, student.logits[pupil], temperature)

    return Term(name, weight, loss)


def cross_entropies(count: int) -> tuple[Term, ...]:
    """A cross-entropy with weight 1 for each of `count` classifiers."""
    return tuple(cross_entropy(exit=i, name=f"cross_entropy{i}") for i in range(count))
