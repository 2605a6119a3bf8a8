"""AutoReP (Peng et al., ICCV'23): a learned score per position decides where a ReLU stays, a quadratic replaces it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from shoal.outputs import Outputs
from shoal.reduction.learners.search import Problem
from shoal.reduction.learners.soft import (
    GatedClamp,
    Pressed,
    Pressure,
    SoftReLU,
    batch_sum,
    gradient_spread,
    settle,
    soft_sites,
)
from shoal.reduction.masks import beside, where_positive
from shoal.reduction.quadratic import Quadratic, QuadraticReLU
from shoal.surgery.normal_form import replace
from shoal.training.objective import Term

HYSTERESIS = 0.003
"""A ReLU is removed when its score falls below minus this, and restored above plus this (AutoReP's value)."""
START = 0.3
FITTING = 0.125
"""The initial score, and the fraction of the search in which the quadratics are fitted and not yet learned."""


class _Step(Function):
    """The mask as 0 and 1; the gradient by the score is softplus(score) times the incoming one (straight-through)."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(score)
        return mask.to(score.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (score,) = ctx.saved_tensors
        return gradients[0] * F.softplus(score), None


class _Quadratic(Function):
    """ReLU where `kept` is 1, the quadratic a x^2 + b x + c where it is 0.

    Differentiable by x [N, C, ...], `kept` [C, ...] and the coefficients a, b, c [C]. Of activations only x is saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(x, kept, a, b, c)
        a, b, c = (v.to(x.dtype).view(-1, *(1,) * (kept.dim() - 1)) for v in (a, b, c))
        # With weights of 0 and 1 `lerp` chooses one of its two ends. It is vectorised; `where` is slower on a CPU.
        return torch.lerp(_quadratic(x, a, b, c), x.clamp(min=0), beside(kept, x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, kept, *coefficients), gradient = ctx.saved_tensors, gradients[0]
        a, b, c = (v.to(x.dtype).view(-1, *(1,) * (kept.dim() - 1)) for v in coefficients)
        spatial, inside = (0, *range(2, x.dim())), beside(kept, x)
        by_kept = None
        if ctx.needs_input_grad[1]:
            by_kept = batch_sum(_quadratic(x, a, b, c).neg_().add_(x.clamp(min=0)).mul_(gradient))
        outside = gradient * (1 - inside)
        weighed = outside * x
        by_x = torch.addcmul(outside * b, weighed, 2 * a).addcmul_(where_positive(gradient, x), inside)
        by_square = (weighed * x).sum(spatial)
        return by_x, by_kept, by_square, weighed.sum(spatial), outside.sum(spatial)


def _quadratic(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.addcmul(b, x, a).mul_(x).add_(c)


class GatedReLU(SoftReLU):
    """ReLU at the positions that learned scores [C, H, W] keep; elsewhere the quadratic `rest`, or the identity."""

    def __init__(self, shape: tuple[int, ...], rest: Quadratic | None = None) -> None:
        super().__init__(shape)
        self.score = nn.Parameter(torch.full(shape, START))
        self.rest = rest

    def switch(self) -> None:
        """Update the mask from the scores, with hysteresis."""
        with torch.no_grad():
            self.set_mask(torch.where(self.mask, self.score > -HYSTERESIS, self.score > HYSTERESIS))

    def kept(self) -> Tensor:
        """The mask as 0 and 1, [C, H, W] in the dtype of the scores, with a straight-through gradient to the scores."""
        return _Step.apply(self.score, self.mask)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        if self.rest is None:
            return GatedClamp.apply(x, self.kept(), self.floor.to(x.dtype)) if self.soft else super().forward(x)
        if self.rest.fitting and self.training:
            self.rest.observe(x)
        return _Quadratic.apply(x, self.kept(), *self.rest.coefficients())


class AutoRePLinear(Pressed[GatedReLU]):
    """AutoReP with the identity at positions without a ReLU.

    Scores are learned by a straight-through gradient. A penalty on the number of ReLUs acts while that number is above
    the line from all ReLUs to the budget (`Problem.line`).
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.model = self.install({s.name: GatedReLU(s.shape, self.quadratic(s.shape)) for s in problem.sites})
        self.sites = soft_sites(self.model, GatedReLU)
        self.begin()
        scores = [f"{name}.score" for name in self.sites]
        self.pressure = Pressure(problem, gradient_spread(self.model, problem, scores))
        for module in self.sites.values():
            module.rate_multiplier = self.pressure.multiplier(START + HYSTERESIS)
        self.terms = (Term("density", 1.0, self._penalty),)

    @staticmethod
    def quadratic(shape: tuple[int, ...]) -> Quadratic | None:
        """The function at positions without a ReLU of a site of `shape`; None for the identity."""
        return None

    def begin(self) -> None:
        """Prepare the network before its gradients are measured; does nothing here."""

    def _penalty(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        sums = torch.stack([module.kept().sum() for module in self.sites.values()])
        return self.pressure.strength * sums.sum()

    def on_step(self, model: nn.Module, epoch: float) -> bool:
        """Update the masks, adjust the penalty, and at the last step fix the masks; returns whether they were fixed."""
        soft = all(module.soft for module in self.sites.values())
        return soft and self._switch(self.problem.step(epoch))

    def _switch(self, step: int) -> bool:
        for module in self.sites.values():
            module.switch()
        if step >= self.problem.last_step:
            settle(self.sites, self.top({name: m.score.detach() for name, m in self.sites.items()}))
            self.pressure.rest()
            return True
        if self.pressure.is_due(step):
            self.pressure.look(self._left(), step)
        return False

    def _left(self) -> float:
        return float(torch.stack([module.mask.sum() for module in self.sites.values()]).sum())

    def on_epoch_end(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """The number of ReLUs left and the weight of the penalty."""
        return {"relus_left": self._left(), "pressure": self.pressure.weight}


class AutoReP(AutoRePLinear):
    """AutoReP: at positions without a ReLU, a quadratic per channel that is first fitted and then learned.

    Each such position squares a value, which costs communication, so compare networks by protocol cost and not by their
    number of ReLUs.
    """

    rest = "quadratic"

    @staticmethod
    def quadratic(shape: tuple[int, ...]) -> Quadratic | None:
        """A quadratic of each channel."""
        return Quadratic(shape[0])

    def begin(self) -> None:
        """Fit the quadratics to the teacher's activations."""
        training = self.model.training
        self.model.eval()
        for module in self.sites.values():
            module.train()
        self._fit(True)
        with torch.no_grad():
            for x, _ in self.problem.batches():
                self.model(x)
        self._fit(False)
        self.model.train(training)

    def on_step(self, model: nn.Module, epoch: float) -> bool:
        """Fit the quadratics at the beginning, later learn them; otherwise as `AutoRePLinear`."""
        changed = self._fit(self.problem.step(epoch) < FITTING * self.problem.all_steps)
        return super().on_step(model, epoch) or changed

    def _fit(self, fitting: bool) -> bool:
        """Start or stop fitting; returns whether this changed anything."""
        rests = [module.rest for module in self.sites.values() if module.rest is not None]
        changed = any(rest.fitting != fitting for rest in rests)
        for rest in rests:
            rest.fitting = fitting
        return changed

    def finished(self) -> nn.Module:
        """A copy of the trained network with the final masks and quadratics."""
        done = {n: QuadraticReLU(m.mask, copy.deepcopy(m.rest)) for n, m in self.sites.items()}
        return replace(self.model, done)
