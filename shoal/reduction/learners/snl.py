"""SNL (Cho et al., ICML'22): one slope a position under an L1 penalty, and its forms with one slope a layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shoal.outputs import Outputs
from shoal.reduction.learners.magnitude import clamped_means
from shoal.reduction.learners.search import Problem
from shoal.reduction.learners.soft import Pressed, Pressure, SlopedReLU, gradient_spread, settle, soft_sites
from shoal.reduction.masks import top_k
from shoal.surgery.sites import ReluSite
from shoal.training.objective import Term

USED = 0.01
"""A slope above this counts as a ReLU (SNL's own threshold)."""


class SNL(Pressed[SlopedReLU]):
    """One slope a position, pressed towards 0 (the identity) by an L1 penalty; the largest stay.

    Slopes are kept in [0, 1]. The budget is exact however short the schedule: at its `CLOSING` part the largest slopes
    become ReLUs, wherever the penalty has brought them, and the rest of it trains on those masks.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        sites = {s.name: SlopedReLU(s.shape, self.slopes(s)) for s in problem.sites}
        self.model = self.install(sites)
        self.pressure = Pressure(problem, gradient_spread(self.model, problem, [f"{name}.slope" for name in sites]))
        self.sites = soft_sites(self.model, SlopedReLU)
        for module in self.sites.values():
            module.rate_multiplier = self.pressure.multiplier(1.0)
        self.terms = (Term("slopes", 1.0, self._penalty),)

    @staticmethod
    def slopes(site: ReluSite) -> tuple[int, ...]:
        """The shape of a site's slopes."""
        return site.shape

    def _penalty(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        sums = torch.stack([module.slope.sum() for module in self.sites.values()])
        return self.pressure.strength * sums.sum()

    def on_step(self, model: nn.Module, epoch: float) -> bool:
        """Keep slopes in [0, 1], look at how many are left, and settle in the end; returns whether it did."""
        step = self.problem.step(epoch)
        if not all(module.soft for module in self.sites.values()):
            return False
        with torch.no_grad():
            for module in self.sites.values():
                module.slope.clamp_(0, 1)
        if step >= self.problem.last_step:
            settle(self.sites, self.choose())
            self.pressure.rest()
            return True
        if self.pressure.is_due(step):
            self.pressure.look(self._left(), step)
        return False

    def _left(self) -> float:
        """The sum of all slopes, a slope of a whole site as often as it has positions."""
        means = torch.stack([m.slope.detach().double().mean() * m.mask.numel() for m in self.sites.values()])
        return float(means.sum())

    def choose(self) -> dict[str, Tensor]:
        """The positions of the largest slopes."""
        return self.top({name: module.slope.detach() for name, module in self.sites.items()})

    def on_epoch_end(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """How many slopes count as ReLUs, as SNL counts them, and the penalty's weight."""
        masks = [m.slope.detach().expand(m.mask.shape) > USED if m.soft else m.mask for m in self.sites.values()]
        return {"slopes_left": float(sum(int(m.sum()) for m in masks)), "pressure": self.pressure.weight}


class LayerFolding(SNL):
    """One slope a ReLU layer, pressed towards the identity; whole layers go, the most linear first (BMVC'22).

    The paper's penalty |1 - a^2|, with a the part of the identity, has no slope at its own start a = 0; its exponent
    is 1 here. The last layer goes in part, by the mean size of what its ReLU clamps.
    """

    @staticmethod
    def slopes(site: ReluSite) -> tuple[int, ...]:
        """One slope for the whole site."""
        return (1,) * len(site.shape)

    def choose(self) -> dict[str, Tensor]:
        """Whole layers by slope; the last one that fits in part."""
        order = sorted(self.sites, key=lambda name: -float(self.sites[name].slope.detach()))
        sizes = {name: self.sites[name].mask.numel() for name in order}
        means = clamped_means(self.model, self.problem)
        return {
            name: top_k(means[name], count, self.problem.granularity)
            for name, count in fill(order, sizes, self.problem.total).items()
        }


def fill(order: list[str], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Counts that add up to `total`: names in order get all of their size, one a part, the rest nothing."""
    counts: dict[str, int] = {}
    for name in order:
        counts[name] = min(sizes[name], total - sum(counts.values()))
    return counts
