"""Sites whose ReLUs are being learned, and the penalty that presses their number down."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from shoal.graph.graph import Lowered
from shoal.outputs import unwrap
from shoal.reduction.learners.search import Problem, Search
from shoal.reduction.masks import MaskedReLU, beside, passed_on, where_positive
from shoal.training.schedule import Schedule

CHECKS, GROWTH = 128, 1.1
"""How often in a search the penalty is looked at, and the factor by which its weight then grows (SNL's)."""
PULL = 0.3
"""A position's pull at the start, in units of the spread of its gradient from batch to batch."""
SAMPLES = 16
"""Batches over which gradients are measured at the start."""


class SoftReLU(MaskedReLU):
    """A masked ReLU that computes something learnable instead until `settle` fixes its kept positions."""

    learning: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(torch.ones(shape, dtype=torch.bool))
        self.rate_multiplier = 1.0
        self.register_buffer("learning", torch.ones((), dtype=torch.bool))
        self.refresh()

    def refresh(self) -> None:
        """Derive what follows from the buffers, also after they were loaded."""
        super().refresh()
        self._be("learning" in self._buffers and bool(self.learning))

    def _be(self, soft: bool) -> None:
        self.soft = soft
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(soft)

    def settle(self, mask: Tensor) -> None:
        """Be an ordinary masked ReLU from now on."""
        self.learning.fill_(False)
        self._be(False)
        self.set_mask(mask)

    def to_node(self) -> Lowered:
        """Not deployable: the search must end first."""
        return "unknown", {"target": f"{type(self).__name__} (end the search of masks first)"}, {}


class SlopedReLU(SoftReLU):
    """x - a min(x, 0): the ReLU where the slope a is 1, the identity where it is 0 (SNL, section 3).

    `slope` has the site's shape [C, H, W], or ones in its place for one slope for all.
    """

    def __init__(self, shape: tuple[int, ...], slopes: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.slope = nn.Parameter(torch.ones(slopes))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        return sloped(x, self.slope) if self.soft else super().forward(x)


def sloped(x: Tensor, slope: Tensor) -> Tensor:
    """x - slope min(x, 0) for x [N, ...] and slope [...]."""
    result: Tensor = _Sloped.apply(x, beside(slope, x))
    return result


def batch_sum(values: Tensor) -> Tensor:
    """The sum of [N, ...] over its first dimension; `values` is overwritten.

    Halves are added to halves: on a CPU several times faster than `sum(0)`, and as short a chain of roundings.
    """
    count = len(values)
    while count > 1:
        half = count // 2
        values[:half].add_(values[count - half : count])
        count -= half
    return values[0]


class _Sloped(Function):
    """x - slope min(x, 0), from kernels that a CPU runs in vectors; nothing saved but the arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return torch.addcmul(x, x.clamp(max=0), slope, value=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (x, slope), gradient = ctx.saved_tensors, gradients[0]
        below = gradient - where_positive(gradient, x)
        by_slope = batch_sum(below * x).neg_()
        return torch.addcmul(gradient, below, slope, value=-1), by_slope.sum_to_size(slope.shape)


class GatedClamp(Function):
    """ReLU at the kept positions, identity elsewhere, by the mask's clamp; a gradient for the mask, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, floor: Tensor) -> Tensor:
        ctx.save_for_backward(x, floor)
        return torch.clamp(x, min=floor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, floor), gradient = ctx.saved_tensors, gradients[0]
        by_mask = batch_sum(x.clamp(max=0).mul_(gradient)).neg_()
        return passed_on(gradient, x, floor), by_mask, None


Site = TypeVar("Site", bound=SoftReLU)


def soft_sites(model: nn.Module, kind: type[Site]) -> dict[str, Site]:
    """The learning sites of `model` by name."""
    return {name: m for name, m in unwrap(model).named_modules() if isinstance(m, kind)}


def settle(sites: Mapping[str, SoftReLU], masks: Mapping[str, Tensor]) -> None:
    """Fix the kept positions of every site."""
    for name, module in sites.items():
        module.settle(masks[name])


def gradient_spread(model: nn.Module, problem: Problem, parameters: Iterable[str]) -> float:
    """Root mean square over batches and elements of the cross-entropy's gradient by these parameters of `model`.

    Measured on a copy in training mode over training images; the model stays as it is.
    """
    trial = copy.deepcopy(model).train()
    chosen = [trial.get_parameter(name) for name in parameters]
    squares, elements = 0.0, sum(p.numel() for p in chosen)
    batches = list(islice(problem.batches(), SAMPLES))
    for x, y in batches:
        loss = F.cross_entropy(_final(trial(x)), y)
        gradients = torch.autograd.grad(loss, chosen, allow_unused=True)  # a site may feed another classifier alone
        squares += sum(float(g.double().square().sum()) for g in gradients if g is not None)
    return math.sqrt(squares / (elements * len(batches))) or 1e-12


def _final(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[-1] if isinstance(result, (tuple, list)) else result


class Pressure:
    """The weight of a sparsity penalty, and when it acts: while the ReLUs left are above the problem's line.

    SNL multiplies the weight by 1.1 after an epoch that brings no fewer ReLUs, for up to 2000 epochs. A short schedule
    cannot wait: here the number is looked at 128 times in a search, and the penalty rests where the line is kept.
    `scale` is what a gradient by one slope or score is like (`gradient_spread`).
    """

    def __init__(self, problem: Problem, scale: float) -> None:
        self.problem, self.scale = problem, scale
        self.weight, self.lowest, self.acts = PULL * scale, math.inf, True
        self.every = max(1, problem.last_step // CHECKS)
        self.strength = torch.full((), self.weight, device=next(problem.model.parameters()).device)
        """The weight, or 0 while the penalty rests; one tensor, changed in place."""

    def multiplier(self, distance: float) -> float:
        """The rate multiplier at which the first weight alone moves a parameter by `distance` before the last step."""
        schedule, steps = self.problem.schedule, max(1, self.problem.last_step)
        way = _mean_rate(schedule) / (1 - schedule.momentum) * steps
        return distance / (self.weight * way)

    def is_due(self, step: int) -> bool:
        """Whether to look at the number of ReLUs before this step."""
        return step % self.every == 0

    def look(self, left: float, step: int) -> None:
        """Note the number of ReLUs left, before a step."""
        self.acts = left > self.problem.line(step)
        if self.acts and left >= self.lowest:
            self.weight *= GROWTH
        self.lowest = min(self.lowest, left)
        self._apply()

    def rest(self) -> None:
        """Press no more."""
        self.acts = False
        self._apply()

    def _apply(self) -> None:
        self.strength.fill_(self.weight if self.acts else 0.0)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the model."""
        return {"pressure": torch.tensor([self.weight, self.lowest, float(self.acts)], dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave."""
        self.weight, self.lowest, acts = state["pressure"].tolist()
        self.acts = bool(acts)
        self._apply()


def _mean_rate(schedule: Schedule) -> float:
    moments = [schedule.epochs * (i + 0.5) / 100 for i in range(100)]
    return sum(schedule.rate(moment) for moment in moments) / len(moments)


class Pressed(Search, Generic[Site]):
    """A search whose soft sites a penalty presses to the budget."""

    sites: dict[str, Site]
    pressure: Pressure

    def masks(self) -> dict[str, Tensor]:
        """The settled masks."""
        return {name: module.mask for name, module in self.sites.items()}

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the model."""
        return self.pressure.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave."""
        self.pressure.load(state)
