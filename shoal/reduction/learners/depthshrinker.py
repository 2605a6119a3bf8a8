"""DepthShrinker (Fu et al., ICML'22): a learned score per block decides which blocks keep their inner ReLUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.reduction.budget import allocate
from shoal.reduction.learners.magnitude import clamped_means
from shoal.reduction.learners.search import Problem, Search
from shoal.reduction.learners.snl import fill
from shoal.reduction.learners.soft import CHECKS, GatedClamp, Pressure, SoftReLU, gradient_spread, settle, soft_sites
from shoal.reduction.masks import top_k
from shoal.surgery.sites import find_blocks


class BlockReLU(SoftReLU):
    """A masked ReLU with one score for the whole site, which gets a straight-through gradient from the mask."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.score = nn.Parameter(torch.ones((1,) * len(shape)))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        if not self.soft:
            return super().forward(x)
        return GatedClamp.apply(x, self.score.expand(self.mask.shape), self.floor.to(x.dtype))


def inner_sites(model: nn.Module, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the inner ReLU sites of replaceable blocks; of two blocks that share a convolution, the first."""
    names, taken = [], set[str]()
    for block in find_blocks(model, shape):
        if not taken & set(block.convs):
            names.append(block.name)
            taken = set(block.convs)
    return tuple(names)


class DepthShrinker(Search):
    """The blocks with the highest scores keep all of their inner ReLUs, the last of them some; the rest can be gated.

    The paper has no budget in ReLUs. Here the budget is divided by size: one share for all inner sites together, and
    one for each other site. A site that keeps only some ReLUs keeps those that change the activations of the initial
    network most.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.check(problem.model, problem.shape)
        self.inner = inner_sites(problem.model, problem.shape)
        self.outer = tuple(site for site in problem.sites if site.name not in self.inner)
        self.sizes = {site.name: site.relus for site in problem.sites}
        self.model = self.install({site.name: BlockReLU(site.shape) for site in problem.sites})
        self.sites = soft_sites(self.model, BlockReLU)
        self.means = clamped_means(self.model, problem)
        pressure = Pressure(problem, gradient_spread(self.model, problem, [f"{name}.score" for name in self.inner]))
        for module in self.sites.values():
            module.rate_multiplier = pressure.multiplier(1.0)
        self.every = max(1, problem.last_step // CHECKS)

    @classmethod
    def check(cls, model: nn.Module, shape: tuple[int, ...]) -> None:
        """Raise ShoalError for a network without replaceable blocks."""
        if not inner_sites(model, shape):
            raise ShoalError(
                "found no block conv - relu - conv in the network; need one to score blocks; use another --masks"
            )

    def on_step(self, model: nn.Module, epoch: float) -> bool:
        """Keep as many ReLUs as `Problem.line` gives; at the last step fix the masks. Returns whether it did."""
        step = self.problem.step(epoch)
        if step >= self.problem.last_step and all(module.soft for module in self.sites.values()):
            settle(self.sites, self._masks(self.problem.total))
            return True
        if step < self.problem.last_step and step % self.every == 0:
            for name, mask in self._masks(int(self.problem.line(step))).items():
                self.sites[name].set_mask(mask)
        return False

    def _masks(self, total: int) -> dict[str, Tensor]:
        counts = self._counts(total)
        return {name: top_k(self.means[name], counts[name], self.problem.granularity) for name in self.sites}

    def _counts(self, total: int) -> dict[str, int]:
        """Counts by site, `total` in all: inner sites are filled in the order of scores, the others by size."""
        everything = self.problem.everything
        inside = round(total * sum(self.sizes[name] for name in self.inner) / everything)
        order = sorted(self.inner, key=lambda name: -float(self.sites[name].score.detach()))
        counts = fill(order, self.sizes, inside)
        if total == inside:
            return counts | {site.name: 0 for site in self.outer}
        return (
            counts | allocate(self.outer, {site.name: float(site.relus) for site in self.outer}, total - inside).counts
        )

    def masks(self) -> dict[str, Tensor]:
        """The final masks."""
        return {name: module.mask for name, module in self.sites.items()}
