"""What every learner of masks is given, and what it gives: a network for `fit`, hooks and terms, then exact masks."""

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
"""Where in the schedule masks are final; the rest of it trains on them."""


@dataclass(frozen=True)
class Problem:
    """What a search is given.

    `model` has a plain ReLU at every site and the weights to begin with; `total` ReLUs are to stay. `steps` are the
    optimiser's an epoch. `batches` gives normalised training images [N, C, H, W] with labels, evenly spread over the
    set; `share` the sites' budgets for any total, to learners that want them. `score` is SENet's, `beta` and
    `pram_form` are those of a PRAM term.
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
        """All ReLUs of the network."""
        return sum(site.relus for site in self.sites)

    @property
    def all_steps(self) -> int:
        """The optimiser's steps in the whole search."""
        return self.schedule.epochs * self.steps

    @property
    def last_step(self) -> int:
        """The step, counted from 0, before which masks become final."""
        return int(CLOSING * self.all_steps)

    def step(self, epoch: float) -> int:
        """The step, counted from 0, at a moment in epochs."""
        return round(epoch * self.steps)

    def line(self, step: int) -> float:
        """ReLUs at a step when they go evenly from all to `total`, which they are from `last_step` on."""
        part = min(1.0, step / self.last_step) if self.last_step else 1.0
        return self.everything + (self.total - self.everything) * part

    def budget(self, total: int) -> Budget:
        """The sites' budgets. Raises ShoalError where no sensitivity was measured."""
        if self.share is None:
            raise ShoalError("found no sensitivity for a learner of masks that needs budgets; need one; run stage 1")
        return self.share(total)


class Search(ABC):
    """One search: `model` is what `fit` trains, with `hooks` (by default the search itself) and `terms` in the loss.

    `per_site` learners need a budget for each site, so a measured sensitivity; the others share the total themselves.
    `from_teacher` learners always begin with the teacher's weights. `rest` says what positions without a ReLU do,
    `granularities` which ones it can keep to.
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
        # Epochs with more ReLUs than the budget, or with soft masks, are no candidates.
        self.select_from = min(int(CLOSING * epochs), epochs - 1)

    @classmethod  # noqa: B027 - a learner may have nothing to refuse
    def check(cls, model: nn.Module, shape: tuple[int, ...]) -> None:
        """Raise ShoalError, before any training, for a network that this learner has nothing to learn on."""

    def install(self, modules: Mapping[str, nn.Module]) -> nn.Module:
        """A copy of the problem's network with these modules at its sites, on its device."""
        device = next(self.problem.model.parameters()).device
        return replace(self.problem.model, modules).to(device)

    @abstractmethod
    def masks(self) -> dict[str, Tensor]:
        """Exactly `total` kept positions, bool [C, H, W] by site, once `fit` has ended."""

    def finished(self) -> nn.Module:
        """A copy of the trained network with these masks and no soft module."""
        return add_masks(self.model, self.masks())

    def top(self, scores: Mapping[str, Tensor], total: int | None = None) -> dict[str, Tensor]:
        """Masks of the highest scores, all sites together: the problem's total, or another."""
        return global_top_k(scores, self.problem.total if total is None else total, self.problem.granularity)


def kept(masks: Mapping[str, Tensor]) -> Budget:
    """The budget that masks amount to."""
    return Budget({n: int(m.sum()) for n, m in masks.items()}, {n: prod(m.shape) for n, m in masks.items()})
