"""SNL (Cho et al., ICML'22), one slope per position under an L1 penalty; and Layer Folding, one slope per layer."""

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
    """One slope per position; an L1 penalty reduces them towards 0 (the identity), and the largest become ReLUs.

    Slopes are kept in [0, 1]. The budget is met exactly even with a short schedule: after the fraction `CLOSING` of it
    the positions with the largest slopes become ReLUs, whatever the slopes are, and the rest trains with those masks.
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
        """Clamp slopes to [0, 1], adjust the penalty, and at the last step fix the masks; returns whether they were."""
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
        """The sum of all positions' slopes; a slope shared by a site counts once for each of its positions."""
        means = torch.stack([m.slope.detach().double().mean() * m.mask.numel() for m in self.sites.values()])
        return float(means.sum())

    def choose(self) -> dict[str, Tensor]:
        """Masks of the positions with the largest slopes, bool [C, H, W] by site."""
        return self.top({name: module.slope.detach() for name, module in self.sites.items()})

    def on_epoch_end(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """The number of slopes above `USED`, which SNL counts as ReLUs, and the weight of the penalty."""
        masks = [m.slope.detach().expand(m.mask.shape) > USED if m.soft else m.mask for m in self.sites.values()]
        return {"slopes_left": float(sum(int(m.sum()) for m in masks)), "pressure": self.pressure.weight}


class LayerFolding(SNL):
    """Layer Folding (BMVC'22): one slope per ReLU layer; whole layers become linear, those with the least slope first.

    The paper's penalty is |1 - a^2|, where a is the weight of the identity. Its gradient is 0 at the paper's initial
    value a = 0, so the exponent is 1 here. The last layer that fits the budget keeps only some ReLUs, those with the
    largest mean of |min(x, 0)|.
    """

    @staticmethod
    def slopes(site: ReluSite) -> tuple[int, ...]:
        """One slope for the whole site."""
        return (1,) * len(site.shape)

    def choose(self) -> dict[str, Tensor]:
        """Masks that keep whole layers in descending order of slopes, and part of the last one."""
        order = sorted(self.sites, key=lambda name: -float(self.sites[name].slope.detach()))
        sizes = {name: self.sites[name].mask.numel() for name in order}
        means = clamped_means(self.model, self.problem)
        return {
            name: top_k(means[name], count, self.problem.granularity)
            for name, count in fill(order, sizes, self.problem.total).items()
        }


def fill(order: list[str], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Counts that add up to `total`: names get their whole size in order until the total is used up."""
    counts: dict[str, int] = {}
    for name in order:
        counts[name] = min(sizes[name], total - sum(counts.values()))
    return counts
