"""k-NN soft labels: a network teaches itself how often each class is found near a sample's own output.

Tzelepi and Tefas, *Online Self-Acquired Knowledge Distillation* (OSAKD), eq. 1 to 5. The paper leaves open where
neighbours are looked for, in which space, whether a sample is its own neighbour, and by what the squared error is
divided; each of these is an argument here.
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
"""Where distances are measured, as functions of logits [N, classes]."""


@dataclass(frozen=True)
class Neighbourhood:
    """Where a sample's neighbours are looked for: `k` of them, Euclidean, in a `space` of `SPACES`.

    `exclude_self` leaves the sample itself out, whose label the cross-entropy teaches already. `bank` outputs of
    earlier batches count beside the mini-batch; 0 is the mini-batch alone. Raises ShoalError for values without a
    meaning.
    """

    k: int = 8
    space: str = "logits"
    exclude_self: bool = True
    bank: int = 0

    def __post_init__(self) -> None:
        """Raise ShoalError for an unknown space, no neighbours, or a bank of fewer than none."""
        if self.space not in SPACES:
            raise ShoalError(f"found space {self.space!r}; need one of {', '.join(SPACES)}; choose one")
        if self.k < 1 or self.bank < 0:
            raise ShoalError(f"found k {self.k} and a bank of {self.bank}; need k >= 1 and bank >= 0; change them")

    def check(self, batch: int) -> None:
        """Raise ShoalError when a mini-batch of `batch` samples, all there is at first, has too few neighbours."""
        if batch - self.exclude_self < self.k:
            raise ShoalError(
                f"found k {self.k} with {batch} samples in a batch; need {self.k + self.exclude_self} samples or more; "
                "take fewer neighbours or a larger batch"
            )


def neighbour_labels(
    points: Tensor, references: Tensor, labels: Tensor, k: int, classes: int, *, exclude_self: bool = True
) -> Tensor:
    """Label frequencies [N, classes] among the `k` nearest of `references` [M, D] to each of `points` [N, D] (eq. 4).

    The first N references are the points themselves; `labels` [M] are the references'. Of equal distances the earlier
    reference is the nearer. No gradient goes through the result. Raises ShoalError for fewer than `k` neighbours.
    """
    if len(references) - exclude_self < k:
        raise ShoalError(f"found {len(references)} samples for k {k}; need more of them; take fewer neighbours")
    with torch.no_grad():
        # By matrix products a point would be at some small distance from itself, and ties would be broken by rounding.
        distances = torch.cdist(
            points.detach().float(), references.detach().float(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        if exclude_self:
            distances.fill_diagonal_(torch.inf)
        near = labels[_nearest(distances, k)]
        counts = torch.zeros(len(points), classes, device=distances.device)
        return counts.scatter_add_(1, near, torch.ones_like(near, dtype=counts.dtype)).div_(k)


def _nearest(distances: Tensor, k: int) -> Tensor:
    """Places [N, k] of the smallest float32 values of each row [N, M], none negative; of equal ones the first.

    `topk` promises no order among those. Such floats are in the order of their bits; below them the place decides.
    """
    places = torch.arange(distances.shape[1], device=distances.device)
    keys = distances.view(torch.int32).long().mul_(1 << 32).add_(places)
    return keys.topk(k, 1, largest=False, sorted=False).indices


class NeighbourTeacher:
    """Gives each mini-batch its soft labels, and keeps the last `bank` outputs; a hook, for that survives a resume.

    `classes` are those of the labels. An older output of the same image may be among the kept ones: the loop gives
    no image a name.
    """

    taps: tuple[str, ...] = ()

    def __init__(self, neighbourhood: Neighbourhood, classes: int) -> None:
        self.neighbourhood, self.classes = neighbourhood, classes
        self.points: Tensor | None = None
        self.labels: Tensor | None = None

    def soft_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Soft labels [N, classes] for logits [N, classes]; both are then remembered."""
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
        """What a checkpoint keeps: the bank, once it holds something."""
        if self.points is None or self.labels is None:
            return {}
        return {"points": self.points, "labels": self.labels}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` gave."""
        self.points, self.labels = state.get("points"), state.get("labels")


def _squared(soft: Tensor, logits: Tensor) -> Tensor:
    return F.mse_loss(logits.softmax(1), soft, reduction="sum") / len(soft)


def _divided(soft: Tensor, logits: Tensor) -> Tensor:
    return F.mse_loss(logits.softmax(1), soft)


def _divergence(soft: Tensor, logits: Tensor) -> Tensor:
    # The other direction is infinite: most soft labels have a class without any neighbour.
    return F.kl_div(logits.log_softmax(1), soft, reduction="batchmean")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse-sum": _squared,
    "mse-mean": _divided,
    "kl": _divergence,
}
"""Means over the batch, of (soft labels, logits), both [N, classes]: the squared error of the softmax, summed over the
classes or divided by their number, and KL(soft labels || softmax)."""


def neighbours(
    teacher: NeighbourTeacher, weight: float, loss: str = "mse-sum", exit: int = -1, name: str = "neighbours"
) -> Term:
    """Classifier `exit` towards the soft labels of its own outputs (OSAKD eq. 5, second term; `weight` is 1 - lambda).

    The teacher must be among the hooks of `fit` as well, for its bank to survive a resume. Raises ShoalError for a
    loss that is not in `LOSSES`.
    """
    if loss not in LOSSES:
        raise ShoalError(f"found loss {loss!r}; need one of {', '.join(LOSSES)}; choose one")
    measure = LOSSES[loss]

    def value(student: Outputs, _: Outputs | None, labels: Tensor) -> Tensor:
        logits = student.logits[exit].float()
        return measure(teacher.soft_labels(logits, labels), logits)

    return Term(name, weight, value, recordable=not teacher.neighbourhood.bank)
