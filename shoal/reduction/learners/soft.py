"""Masked ReLUs that are still being learned, and the sparsity penalty that reduces their number."""

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
"""How often in a search the penalty is adjusted, and the factor by which its weight then grows (SNL's)."""
PULL = 0.3
"""Initial weight of the penalty, in units of the root mean square gradient (`gradient_spread`)."""
SAMPLES = 16
"""Number of batches over which gradients are measured at the start."""


class SoftReLU(MaskedReLU):
    """A masked ReLU that computes a learnable function instead, until `settle` fixes its kept positions.

    `soft` is true until then.
    """

    learning: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(torch.ones(shape, dtype=torch.bool))
        self.rate_multiplier = 1.0
        self.register_buffer("learning", torch.ones((), dtype=torch.bool))
        self.refresh()

    def refresh(self) -> None:
        """Recompute the floor and `soft` from the buffers; also called after a state dict was loaded."""
        super().refresh()
        self._be("learning" in self._buffers and bool(self.learning))

    def _be(self, soft: bool) -> None:
        self.soft = soft
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(soft)

    def settle(self, mask: Tensor) -> None:
        """Set the final mask (bool [C, H, W]) and compute an ordinary masked ReLU from now on."""
        self.learning.fill_(False)
        self._be(False)
        self.set_mask(mask)

    def to_node(self) -> Lowered:
        """An unknown operation, since the search of masks must end first."""
        return "unknown", {"target": f"{type(self).__name__} (end the search of masks first)"}, {}


class SlopedReLU(SoftReLU):
    """x - a min(x, 0): the ReLU where the slope a is 1, the identity where it is 0 (SNL, section 3).

    `slope` has the site's shape [C, H, W], or [1, 1, 1] for one slope for all positions.
    """

    def __init__(self, shape: tuple[int, ...], slopes: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.slope = nn.Parameter(torch.ones(slopes))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        return sloped(x, self.slope) if self.soft else super().forward(x)


def sloped(x: Tensor, slope: Tensor) -> Tensor:
    """x - slope min(x, 0) for x [N, C, ...] and slope [C, ...], or a slope that broadcasts to it."""
    result: Tensor = _Sloped.apply(x, beside(slope, x))
    return result


def batch_sum(values: Tensor) -> Tensor:
    """The sum of `values` [N, ...] over its first dimension; `values` is overwritten.

    The upper half is added to the lower half until one row is left. This is several times faster on a CPU than
    `sum(0)`, and rounding errors stay small.
    """
    count = len(values)
    while count > 1:
        half = count // 2
        values[:half].add_(values[count - half : count])
        count -= half
    return values[0]


class _Sloped(Function):
    """x - slope min(x, 0), in kernels that are vectorised on a CPU; only the arguments are saved for backward."""

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
    """ReLU at the kept positions, identity elsewhere, as max(x, floor), with a gradient for `kept` too.

    `kept` [C, H, W] is an argument so that it gets a gradient; its values are not read, since `floor` has the mask.
    """

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
    """The modules of `model` that are of class `kind`, by site name."""
    return {name: m for name, m in unwrap(model).named_modules() if isinstance(m, kind)}


def settle(sites: Mapping[str, SoftReLU], masks: Mapping[str, Tensor]) -> None:
    """Fix the kept positions of every site; masks are bool [C, H, W] by site."""
    for name, module in sites.items():
        module.settle(masks[name])


def gradient_spread(model: nn.Module, problem: Problem, parameters: Iterable[str]) -> float:
    """Root mean square of the cross-entropy's gradient by these parameters, over their elements and `SAMPLES` batches.

    Measured on a copy of `model` in training mode; at least 1e-12, so that it can be divided by.
    """
    trial = copy.deepcopy(model).train()
    chosen = [trial.get_parameter(name) for name in parameters]
    squares, elements = 0.0, sum(p.numel() for p in chosen)
    batches = list(islice(problem.batches(), SAMPLES))
    for x, y in batches:
        loss = F.cross_entropy(_final(trial(x)), y)
        gradients = torch.autograd.grad(loss, chosen, allow_unused=True)  # a site may affect only an earlier exit
        squares += sum(float(g.double().square().sum()) for g in gradients if g is not None)
    return math.sqrt(squares / (elements * len(batches))) or 1e-12


def _final(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result[-1] if isinstance(result, (tuple, list)) else result


class Pressure:
    """The weight of a sparsity penalty, which acts while the number of ReLUs left is above `Problem.line`.

    SNL multiplies the weight by 1.1 after each epoch without a decrease of that number, for up to 2000 epochs. Shorter
    schedules need a faster response, so here the number is checked `CHECKS` times in a search, and the penalty is 0
    while the number is at or below the line. `scale` is the typical gradient by one slope or score (`gradient_spread`).
    """

    def __init__(self, problem: Problem, scale: float) -> None:
        self.problem, self.scale = problem, scale
        self.weight, self.lowest, self.acts = PULL * scale, math.inf, True
        self.every = max(1, problem.last_step // CHECKS)
        self.strength = torch.full((), self.weight, device=next(problem.model.parameters()).device)
        """The weight, or 0 while the penalty does not act; a scalar tensor that is changed in place."""

    def multiplier(self, distance: float) -> float:
        """The learning rate multiplier with which the initial penalty alone moves a parameter by `distance`.

        The movement is that up to the problem's last step.
        """
        schedule, steps = self.problem.schedule, max(1, self.problem.last_step)
        way = _mean_rate(schedule) / (1 - schedule.momentum) * steps
        return distance / (self.weight * way)

    def is_due(self, step: int) -> bool:
        """Whether the number of ReLUs is to be checked before this step."""
        return step % self.every == 0

    def look(self, left: float, step: int) -> None:
        """Adjust the penalty to the number of ReLUs left before `step`."""
        self.acts = left > self.problem.line(step)
        if self.acts and left >= self.lowest:
            self.weight *= GROWTH
        self.lowest = min(self.lowest, left)
        self._apply()

    def rest(self) -> None:
        """Turn the penalty off."""
        self.acts = False
        self._apply()

    def _apply(self) -> None:
        self.strength.fill_(self.weight if self.acts else 0.0)

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs besides the model."""
        return {"pressure": torch.tensor([self.weight, self.lowest, float(self.acts)], dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors that `state` returned."""
        self.weight, self.lowest, acts = state["pressure"].tolist()
        self.acts = bool(acts)
        self._apply()


def _mean_rate(schedule: Schedule) -> float:
    moments = [schedule.epochs * (i + 0.5) / 100 for i in range(100)]
    return sum(schedule.rate(moment) for moment in moments) / len(moments)


class Pressed(Search, Generic[Site]):
    """A search whose soft sites are reduced to the budget by a penalty."""

    sites: dict[str, Site]
    pressure: Pressure

    def masks(self) -> dict[str, Tensor]:
        """The final masks."""
        return {name: module.mask for name, module in self.sites.items()}

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs besides the model."""
        return self.pressure.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors that `state` returned."""
        self.pressure.load(state)
