"""ReLUPruner (AAAI-26): positions scored by a second-order Taylor expansion, pruned step by step from all sites."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.distillation.losses import pram
from shoal.reduction.learners.search import CLOSING, Problem, Search
from shoal.reduction.masks import MaskedReLU, masked_sites

PRUNINGS = 24
"""How often in a search ReLUs are pruned, at least once an epoch."""


class ScoredReLU(MaskedReLU):
    """A masked ReLU that gathers what the loss says of removing each position, and the whole layer, while it trains.

    With a slope a, the output is x - a min(x, 0). `first` sums the gradient of the batch's mean loss by a, `second` the
    squares of each image's own gradient (Fisher's form of the curvature); the `layer` pair is the same for one slope
    for all kept positions. `batches` counts.
    """

    first: Tensor
    second: Tensor
    layer: Tensor
    batches: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(torch.ones(shape, dtype=torch.bool))
        for name, size in (("first", shape), ("second", shape), ("layer", (2,)), ("batches", ())):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        y = super().forward(x)
        if self.training and y.requires_grad:
            clamped = x.detach().clamp(max=0)
            y.register_hook(lambda gradient: self._gather(clamped, gradient))
        return y

    def _gather(self, clamped: Tensor, gradient: Tensor) -> None:
        # The batch's loss is a mean: an image's own gradient is as many times larger as there are images.
        by_slope = -(clamped * gradient).float()
        self.first += by_slope.sum(0)
        self.second += len(by_slope) * by_slope.square().sum(0)
        whole = (by_slope * self.mask).flatten(1).sum(1)
        self.layer += torch.stack([whole.sum(), len(whole) * whole.square().sum()])
        self.batches += 1

    def scores(self) -> Tensor:
        """Expected rise of the loss when a position's slope goes from 1 to 0, in float64, times the layer's score.

        The layer's score is the rise when all of its positions go, in relation to the sum of theirs: above 1 where they
        stand in for one another. Positions that are gone have minus infinity.
        """
        count = self.batches.clamp_min(1).double()
        own = (-self.first.double() + 0.5 * self.second.double()) / count
        whole = (-self.layer[0].double() + 0.5 * self.layer[1].double()) / count
        total = own[self.mask].sum()
        ratio = (whole / total).clamp(0.1, 10.0) if total > 0 and whole > 0 else torch.ones_like(whole)
        return torch.where(self.mask, own * ratio, -torch.inf)

    def prune(self, mask: Tensor) -> None:
        """Keep these positions, and gather anew."""
        self.set_mask(mask)
        for gathered in (self.first, self.second, self.layer, self.batches):
            gathered.zero_()


class ReLUPruner(Search):
    """Positions go for good, those first whose removal raises the loss least by a second-order estimate.

    Pruning follows an even line from all ReLUs to the budget, with PRAM in the loss. The paper's own layer score was
    not at hand: see `ScoredReLU.scores` for the one used.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.model = self.install({site.name: ScoredReLU(site.shape) for site in problem.sites})
        self.terms = (pram(problem.beta, [site.name for site in problem.sites], problem.pram_form),)
        prunings = max(PRUNINGS, int(CLOSING * problem.schedule.epochs))
        self.every = max(1, problem.last_step // prunings)

    def on_step(self, model: nn.Module, epoch: float) -> None:
        """Prune down to the line, at even distances and before the last step."""
        step, last = self.problem.step(epoch), self.problem.last_step
        if step == last or (0 < step < last and step % self.every == 0):
            self._prune(int(self.problem.line(step)), step == last)

    def _prune(self, total: int, last: bool) -> None:
        sites = self._sites()
        chosen = self.top({name: module.scores() for name, module in sites.items()}, total)
        for name, module in sites.items():
            mask = chosen[name]
            if self.problem.granularity == "channel" and not last:
                # A channel that is to stay in part waits whole: else every pruning would leave such a one.
                mask = mask.reshape(len(mask), -1).any(1).view(-1, *(1,) * (mask.dim() - 1)).expand_as(mask)
            module.prune(mask & module.mask)

    def _sites(self) -> dict[str, ScoredReLU]:
        return {name: m for name, m in masked_sites(self.model).items() if isinstance(m, ScoredReLU)}

    def on_epoch_end(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """How many ReLUs are left."""
        return {"relus_left": float(sum(int(m.mask.sum()) for m in masked_sites(model).values()))}

    def masks(self) -> dict[str, Tensor]:
        """What pruning has left."""
        return {name: module.mask for name, module in self._sites().items()}
