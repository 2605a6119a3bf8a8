"""Training objectives: weighted sums of loss terms."""

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
"""The factor of a term: a number, or a function of the epoch, counted from 0."""


@dataclass(frozen=True)
class Term:
    """One named term of an objective: `weight` times `loss(student, teacher, labels)`, a scalar.

    The loss reads the outputs of the submodules `taps` (such as ReLU sites) in student and teacher, and those of `own`
    in the student alone. `recordable` is false if the loss depends on Python state from earlier steps; then the step is
    neither compiled nor recorded.
    """

    name: str
    weight: Weight
    loss: Loss
    taps: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    recordable: bool = True

    def weight_at(self, epoch: int) -> float:
        """The weight in `epoch`, counted from 0."""
        return self.weight(epoch) if callable(self.weight) else self.weight


def switched(before: float, after: float, epoch: int) -> Weight:
    """A weight that is `before` until `epoch` begins, and `after` from then on."""
    return lambda now: before if now < epoch else after


@dataclass
class Objective:
    """A sum of terms. `fit` sets the epoch, on which weights may depend; without `fit` it stays 0.

    The weights are one tensor that is changed in place, so that a compiled or recorded step reads the new values.
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
        """All sites that terms read in both networks, each once."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.taps))

    @property
    def own(self) -> tuple[str, ...]:
        """All sites that terms read in the student alone, each once."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.own))

    def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The total (a scalar) and the weighted terms by name, detached. `labels` [N] are int64."""
        losses = torch.stack([term.loss(student, teacher, labels) for term in self.terms])
        if self.weights is None or self.weights.device != losses.device:
            self.weights = torch.tensor([term.weight_at(self.epoch) for term in self.terms], device=losses.device)
        weighted = losses * self.weights
        names = (term.name for term in self.terms)
        return weighted.sum(), dict(zip(names, weighted.detach().unbind(), strict=True))


def taught(teacher: Outputs | None) -> Outputs:
    """The teacher's outputs. Raises ShoalError when there is no teacher."""
    if teacher is None:
        raise ShoalError("found no teacher; need one for a distillation term; pass teacher= to fit")
    return teacher


def cross_entropy(weight: Weight = 1.0, exit: int = -1, name: str = "cross_entropy") -> Term:
    """Mean cross-entropy of classifier `exit` (0 the weakest, -1 the final one) with the labels."""
    return Term(name, weight, lambda s, t, y: F.cross_entropy(s.logits[exit].float(), y))
