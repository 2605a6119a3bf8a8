"""k-NN soft labels: a network learns how often each class occurs among the nearest neighbours of its own outputs.

Tzelepi and Tefas, *Online Self-Acquired Knowledge Distillation* (OSAKD), eq. 1 to 5. The paper does not say where
neighbours are searched, in which space, whether a sample is its own neighbour, and how the squared error is averaged.
Each of these is an argument here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import ShoalError
from shoal.outputs import Outputs
from shoal.training.objective import Term

SPACES: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda z: z,
    "softmax": lambda z: z.softmax(1),
}
"""Spaces in which distances are measured, as functions of logits [N, classes]."""


@dataclass(frozen=True)
class Neighbourhood:
    """How to search a sample's neighbours: the `k` nearest by Euclidean distance, in one of `SPACES`.

    `exclude_self` leaves out the sample itself, whose label the cross-entropy teaches already. `bank` is the number of
    outputs of earlier batches that are searched in addition to the mini-batch. Raises ShoalError for invalid values.
    """

    k: int = 8
    space: str = "logits"
    exclude_self: bool = True
    bank: int = 0

    def __post_init__(self) -> None:
        """Raise ShoalError for an unknown space, `k` below 1, or a negative bank."""
        if self.space not in SPACES:
            raise ShoalError(f"found space {self.space!r}; need one of {', '.join(SPACES)}; choose one")
        if self.k < 1 or self.bank < 0:
            raise ShoalError(f"found k {self.k} and a bank of {self.bank}; need k >= 1 and bank >= 0; change them")

    def check(self, batch: int) -> None:
        """Raise ShoalError when `batch` samples have fewer than `k` neighbours: the first mini-batch has no bank."""
        if batch - self.exclude_self < self.k:
            raise ShoalError(
                f"found k {self.k} with {batch} samples in a batch; need {self.k + self.exclude_self} samples or more; "
                "take fewer neighbours or a larger batch"
            )


def neighbour_labels(
    points: Tensor, references: Tensor, labels: Tensor, k: int, classes: int, *, exclude_self: bool = True
) -> Tensor:
    """Class frequencies [N, classes] (float32) among the `k` nearest references of each point (eq. 4).

    `points` are [N, D] and `references` [M, D], of which the first N are the points themselves; `labels` [M] (int64)
    belong to the references. At equal distances, the earlier reference is nearer. The result has no gradient. Raises
    ShoalError when there are fewer than `k` neighbours.
    """
    if len(references) - exclude_self < k:
        raise ShoalError(
            f"found {len(references)} samples for k {k}; need at least {k + exclude_self}; take fewer neighbours"
        )
    with torch.no_grad():
        # Matrix products have rounding errors: a point would not be at distance 0 from itself, and ties would be lost.
        distances = torch.cdist(
            points.detach().float(), references.detach().float(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        if exclude_self:
            distances.fill_diagonal_(torch.inf)
        near = labels[_nearest(distances, k)]
        counts = torch.zeros(len(points), classes, device=distances.device)
        return counts.scatter_add_(1, near, torch.ones_like(near, dtype=counts.dtype)).div_(k)


def _nearest(distances: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the smallest values in each row [N, M] (float32, not negative); the first among equals.

    `topk` does not order equal values. Nonnegative floats sort like their bits, so the bits followed by the index make
    a unique key.
    """
    places = torch.arange(distances.shape[1], device=distances.device)
    keys = distances.view(torch.int32).long().mul_(1 << 32).add_(places)
    return keys.topk(k, 1, largest=False, sorted=False).indices


class NeighbourTeacher:
    """Computes soft labels for each mini-batch and stores the last `bank` outputs.

    It is also a hook, so that checkpoints include the bank. `classes` is the number of classes. The bank may hold an
    older output of the same image, because the loop does not identify images.
    """

    taps: tuple[str, ...] = ()

    def __init__(self, neighbourhood: Neighbourhood, classes: int) -> None:
        self.neighbourhood, self.classes = neighbourhood, classes
        self.points: Tensor | None = None
        self.labels: Tensor | None = None

    def soft_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Soft labels [N, classes] for logits [N, classes] and labels [N]; both are then added to the bank."""
        where = self.neighbourhood
        points = SPACES[where.space](logits.detach().float())
        references, known = points, labels
        if self.points is not None and self.labels is not None:
            references = torch.cat([points, self.points.to(points)])
            known = torch.cat([labels, self.labels.to(labels)])
        if where.bank:
            self.points, self.labels = references[: where.bank].clone(), known[: where.bank].clone()
        return neighbour_labels(points, references, known, where.k, self.classes, exclude_self=where.exclude_self)

    def state(self) -> dict[str, Tensor]:
        """The bank, for a checkpoint; empty until the bank holds something."""
        if self.points is None or self.labels is None:
            return {}
        return {"points": self.points, "labels": self.labels}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state`."""
        self.points, self.labels = state.get("points"), state.get("labels")


def _squared(soft: Tensor, logits: Tensor) -> Tensor:
    return F.mse_loss(logits.softmax(1), soft, reduction="sum") / len(soft)


def _divided(soft: Tensor, logits: Tensor) -> Tensor:
    return F.mse_loss(logits.softmax(1), soft)


def _divergence(soft: Tensor, logits: Tensor) -> Tensor:
    # The reverse direction is infinite: most soft labels are 0 for some class.
    return F.kl_div(logits.log_softmax(1), soft, reduction="batchmean")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse-sum": _squared,
    "mse-mean": _divided,
    "kl": _divergence,
}
"""Batch means of (soft labels, logits), both [N, classes]: the squared error of the softmax, summed or averaged over
classes, and KL(soft labels || softmax)."""


def neighbours(
    teacher: NeighbourTeacher, weight: float, loss: str = "mse-sum", exit: int = -1, name: str = "neighbours"
) -> Term:
    """Classifier `exit` learns the soft labels of its own outputs (OSAKD eq. 5, second term; `weight` is 1 - lambda).

    Pass the teacher to `fit` as a hook, too, so that its bank survives a resume. Raises ShoalError for a loss that is
    not in `LOSSES`.
    """
    if loss not in LOSSES:
        raise ShoalError(f"found loss {loss!r}; need one of {', '.join(LOSSES)}; choose one")
    measure = LOSSES[loss]

    def value(student: Outputs, _: Outputs | None, labels: Tensor) -> Tensor:
        logits = student.logits[exit].float()
        return measure(teacher.soft_labels(logits, labels), logits)

    return Term(name, weight, value, recordable=not teacher.neighbourhood.bank)
