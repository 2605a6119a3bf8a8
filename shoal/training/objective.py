"""What is optimised: loss terms with weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.outputs import Outputs

Loss = Callable[[Outputs, Outputs | None, Tensor], Tensor]
Weight = float | Callable[[int], float]
"""A term's factor: one number, or what it is in each epoch, counted from 0."""


@dataclass(frozen=True)
class Term:
    """One named part of an objective: `weight` times `loss(student, teacher, labels)`, a scalar.

    `taps` are the submodules, such as ReLU sites, whose results the loss reads of student and teacher, `own` those of
    which it reads the student's alone. `recordable` is false where the loss depends on what Python remembers of earlier
    steps: a step with it is neither compiled nor recorded.
    """

    name: str
    weight: Weight
    loss: Loss
    taps: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    recordable: bool = True

    def weight_at(self, epoch: int) -> float:
        """The factor in `epoch`, counted from 0."""
        return self.weight(epoch) if callable(self.weight) else self.weight


def switched(before: float, after: float, epoch: int) -> Weight:
    """A weight that is `before` in the epochs before `epoch`, then `after`."""
    return lambda now: before if now < epoch else after


@dataclass
class Objective:
    """A sum of terms. `fit` tells it each epoch, which weights may follow; where nobody does, it is epoch 0.

    The weights are one tensor, changed in place: a compiled or recorded step reads the new ones.
    """

    recordable: ClassVar[bool] = True

    terms: tuple[Term, ...]
    epoch: int = field(default=0, init=False)
    weights: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def on_epoch_start(self, model: nn.Module, epoch: int) -> None:
        """Use the weights of `epoch` from now on."""
        self.epoch = epoch
        now = torch.tensor([term.weight_at(epoch) for term in self.terms])
        device = next((p.device for p in model.parameters()), now.device)
        if self.weights is None or self.weights.device != device:
            self.weights = now.to(device)
        self.weights.copy_(now)

    @property
    def taps(self) -> tuple[str, ...]:
        """Every site that a term reads of both networks, once."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.taps))

    @property
    def own(self) -> tuple[str, ...]:
        """Every site that a term reads of the student alone, once."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.own))

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The total and its weighted parts, detached, by name."""
        losses = torch.stack([term.loss(student, teacher, labels) for term in self.terms])
        if self.weights is None or self.weights.device != losses.device:
            self.weights = torch.tensor([term.weight_at(self.epoch) for term in self.terms], device=losses.device)
        weighted = losses * self.weights
        names = (term.name for term in self.terms)
        return weighted.sum(), dict(zip(names, weighted.detach().unbind(), strict=True))


def taught(teacher: Outputs | None) -> Outputs:
    """What the teacher said. Raises ShoalError when there is none."""
    if teacher is None:
        raise ShoalError("found no teacher; need one for a distillation term; pass teacher= to fit")
    return teacher


def cross_entropy(weight: Weight = 1.0, exit: int = -1, name: str = "cross_entropy") -> Term:
    """Mean cross-entropy of classifier `exit` (0 the weakest, -1 the final one) with the labels."""
    return Term(name, weight, lambda s, t, y: F.cross_entropy(s.logits[exit].float(), y))
