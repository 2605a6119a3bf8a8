"""Masked ReLUs with a quadratic function, instead of the identity, at positions without ReLU (AutoReP, ICCV'23)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from shoal.graph.graph import Lowered
from shoal.graph.ops import quadratic_relu
from shoal.reduction.masks import MaskedReLU
from shoal.surgery.normal_form import replace

MOMENTUM = 0.1
"""Momentum of the running mean and variance, as in batch normalisation."""


class Quadratic(nn.Module):
    """The function square x^2 + slope x + offset, with coefficients [C] per channel; initially the identity.

    While `fitting` is true, `observe` sets the coefficients to the best approximation of the ReLU for normally
    distributed inputs with the running mean and variance. Later they are learned, with a tenth of the learning rate.
    """

    mean: Tensor
    variance: Tensor
    seen: Tensor
    rate_multiplier = 0.1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.ones(channels))
        self.offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.zeros(channels))
        self.register_buffer("seen", torch.zeros(()))
        self.fitting = False

    def observe(self, x: Tensor) -> None:
        """Update the running statistics with x [N, C, ...] and fit the coefficients to them."""
        with torch.no_grad():
            values, over = x.detach().float(), (0, *range(2, x.dim()))
            self.seen += 1
            rate = (1 / self.seen).clamp_min(MOMENTUM)
            mean = values.mean(over)
            variance = (values.square().mean(over) - mean.square()).clamp_min(0)
            self.mean.lerp_(mean, rate)
            self.variance.lerp_(variance, rate)
            fitted = fit_quadratic(self.mean, self.variance.sqrt())
            for parameter, value in zip((self.square, self.slope, self.offset), fitted, strict=True):
                parameter.copy_(value)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """(square, slope, offset), each [C]."""
        return self.square, self.slope, self.offset


def fit_quadratic(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(square, slope, offset) of the quadratic with the least mean squared error to the ReLU of a normal variable.

    `mean` and `deviation` have the same shape, and so do the results; a deviation below 1e-6 is taken as 1e-6. With
    t = mean / deviation, the expansion of the ReLU in Hermite polynomials of the standardised variable z begins
    mean Phi(t) + deviation phi(t) + deviation Phi(t) z + deviation phi(t) / 2 (z^2 - 1).
    """
    deviation = deviation.clamp_min(1e-6)
    t = mean / deviation
    below, density = torch.special.ndtr(t), torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)
    square = density / (2 * deviation)
    return square, below - 2 * square * mean, deviation * density / 2 + square * mean.square()


class QuadraticReLU(MaskedReLU):
    """ReLU where `mask` ([C, H, W] bool) is true, elsewhere the `Quadratic` `rest` of the channel."""

    def __init__(self, mask: Tensor, rest: Quadratic | None = None) -> None:
        super().__init__(mask)
        self.rest = Quadratic(len(mask)) if rest is None else rest

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape. Raises ShoalError when [C, H, W] is not the mask's shape."""
        self.check(x)
        return quadratic_relu(x, self.mask, *self.rest.coefficients())

    def to_node(self) -> Lowered:
        """A `quadratic` node with its mask and coefficients."""
        names = ("square", "slope", "offset")
        return "quadratic", {}, {"mask": self.mask, **dict(zip(names, self.rest.coefficients(), strict=True))}


def add_quadratics(model: nn.Module, masks: Mapping[str, Tensor]) -> fx.GraphModule:
    """A copy of `model` with a `QuadraticReLU` at each named ReLU site; masks are bool [C, H, W].

    Raises ShoalError for a name that is not that of a submodule.
    """
    return replace(model, {name: QuadraticReLU(mask) for name, mask in masks.items()})
