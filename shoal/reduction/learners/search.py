"""The interface of learners of masks: `Problem`, which a learner is given, and `Search`, its base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.reduction.budget import Budget
from shoal.reduction.masks import add_masks, global_top_k
from shoal.surgery.normal_form import replace
from shoal.surgery.sites import ReluSite
from shoal.training.objective import Term
from shoal.training.schedule import Schedule

CLOSING = 0.75
"""Fraction of the schedule after which masks are final; the rest of the schedule trains with them."""


@dataclass(frozen=True)
class Problem:
    """The inputs of a search.

    `model` has a plain ReLU at every site and the initial weights; `total` is the number of ReLUs to keep. `shape` is
    the images' [C, H, W]. `steps` is the number of optimiser steps per epoch. `batches` yields normalised training
    images [N, C, H, W] with labels [N], evenly spread over the training set. `share` gives the sites' budgets for any
    total; None if no sensitivity was measured. `score` and `begins_learned` are options of `SENet`, `beta` and
    `pram_form` those of a PRAM term.
    """

    model: nn.Module
    teacher: nn.Module
    sites: tuple[ReluSite, ...]
    shape: tuple[int, ...]
    total: int
    schedule: Schedule
    steps: int
    seed: int
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    share: Callable[[int], Budget] | None = None
    granularity: str = "pixel"
    score: str = "counterfactual"
    begins_learned: bool = True
    beta: float = 1.0
    pram_form: str = "paper"

    @property
    def everything(self) -> int:
        """The number of ReLUs of the unreduced network."""
        return sum(site.relus for site in self.sites)

    @property
    def all_steps(self) -> int:
        """The number of optimiser steps of the whole schedule."""
        return self.schedule.epochs * self.steps

    @property
    def last_step(self) -> int:
        """The step, counted from 0, before which masks become final."""
        return int(CLOSING * self.all_steps)

    def step(self, epoch: float) -> int:
        """The step, counted from 0, at a time given in epochs."""
        return round(epoch * self.steps)

    def line(self, step: int) -> float:
        """The number of ReLUs at a step on a straight line from all ReLUs to `total`, reached at `last_step`."""
        fraction = min(1.0, step / self.last_step) if self.last_step else 1.0
        return self.everything + (self.total - self.everything) * fraction

    def budget(self, total: int) -> Budget:
        """The sites' budgets for `total` ReLUs. Raises ShoalError when no sensitivity was measured."""
        if self.share is None:
            raise ShoalError("found no sensitivity for a learner of masks that needs budgets; need one; run stage 1")
        return self.share(total)


class Search(ABC):
    """Base class of the learners. `fit` trains `model` with `hooks` (by default the search itself) and loss `terms`.

    `per_site` learners need a budget for each site, and so a measured sensitivity; the others divide the total among
    the sites themselves. `from_teacher` learners always begin with the teacher's weights. `rest` names the function at
    positions without a ReLU. `granularities` lists the granularities that the learner supports.
    """

    per_site = False
    from_teacher = True
    rest = "identity"
    granularities: tuple[str, ...] = ("pixel", "channel")
    taps: tuple[str, ...] = ()
    recordable = True
    terms: tuple[Term, ...] = ()

    model: nn.Module

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.hooks: tuple[Any, ...] = (self,)
        epochs = problem.schedule.epochs
        # Weights of earlier epochs may not be selected: they have more ReLUs than the budget, or soft masks.
        self.select_from = min(int(CLOSING * epochs), epochs - 1)

    @classmethod  # noqa: B027 - a learner may have nothing to refuse
    def check(cls, model: nn.Module, shape: tuple[int, ...]) -> None:
        """Raise ShoalError for a network that this learner cannot handle; called before any training."""

    def install(self, modules: Mapping[str, nn.Module]) -> nn.Module:
        """A copy of the problem's network, on the same device, with these modules at its sites."""
        device = next(self.problem.model.parameters()).device
        return replace(self.problem.model, modules).to(device)

    @abstractmethod
    def masks(self) -> dict[str, Tensor]:
        """The final masks once `fit` has ended: bool [C, H, W] by site, with exactly `total` true positions."""

    def finished(self) -> nn.Module:
        """A copy of the trained network with the final masks and without modules that only the search needs."""
        return add_masks(self.model, self.masks())

    def top(self, scores: Mapping[str, Tensor], total: int | None = None) -> dict[str, Tensor]:
        """Masks of the `total` (by default the problem's) highest scores of all sites together; see `global_top_k`."""
        return global_top_k(scores, self.problem.total if total is None else total, self.problem.granularity)


def kept(masks: Mapping[str, Tensor]) -> Budget:
    """The budget with the counts of these masks."""
    return Budget({n: int(m.sum()) for n, m in masks.items()}, {n: prod(m.shape) for n, m in masks.items()})
