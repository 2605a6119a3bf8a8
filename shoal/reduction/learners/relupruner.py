"""ReLUPruner (AAAI-26): ReLUs scored by a second-order Taylor expansion of the loss and pruned step by step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.distillation.losses import pram
from shoal.reduction.learners.search import CLOSING, Problem, Search
from shoal.reduction.masks import MaskedReLU, masked_sites

PRUNINGS = 24
"""Number of prunings in a search; more in a long one, so that there is at least one an epoch."""


class ScoredReLU(MaskedReLU):
    """A masked ReLU that collects, while training, the gradients needed to score the removal of each position.

    The output is x - a min(x, 0) with slope a = 1. Sums over batches: `first` [C, H, W] is the gradient of the batch's
    mean loss by each position's a; `second` [C, H, W] the mean square of the single images' gradients, which
    approximates the curvature (Fisher); `layer` [2] the same two for one slope shared by all kept positions. `batches`
    is the number of batches.
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
        # The loss is a mean over N images, so the gradient of one image's own loss is N times as large.
        by_slope = -(clamped * gradient).float()
        self.first += by_slope.sum(0)
        self.second += len(by_slope) * by_slope.square().sum(0)
        whole = (by_slope * self.mask).flatten(1).sum(1)
        self.layer += torch.stack([whole.sum(), len(whole) * whole.square().sum()])
        self.batches += 1

    def scores(self) -> Tensor:
        """Estimated increase of the loss when a position's slope goes from 1 to 0, times a factor of the layer.

        float64 [C, H, W]; positions without a ReLU have minus infinity. The factor, limited to [0.1, 10], is the
        estimated increase when all ReLUs of the layer are removed, divided by the sum of the single estimates; it is
        above 1 where the ReLUs can replace one another.
        """
        count = self.batches.clamp_min(1).double()
        own = (-self.first.double() + 0.5 * self.second.double()) / count
        whole = (-self.layer[0].double() + 0.5 * self.layer[1].double()) / count
        total = own[self.mask].sum()
        ratio = (whole / total).clamp(0.1, 10.0) if total > 0 and whole > 0 else torch.ones_like(whole)
        return torch.where(self.mask, own * ratio, -torch.inf)

    def prune(self, mask: Tensor) -> None:
        """Set the mask, and restart the sums."""
        self.set_mask(mask)
        for gathered in (self.first, self.second, self.layer, self.batches):
            gathered.zero_()


class ReLUPruner(Search):
    """Prunes, for good, the ReLUs whose removal is estimated to raise the loss least.

    The number of ReLUs falls along `Problem.line`, and the loss has a PRAM term. The paper's own layer score was not
    available; `ScoredReLU.scores` describes the one used here.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.model = self.install({site.name: ScoredReLU(site.shape) for site in problem.sites})
        self.terms = (pram(problem.beta, [site.name for site in problem.sites], problem.pram_form),)
        prunings = max(PRUNINGS, int(CLOSING * problem.schedule.epochs))
        self.every = max(1, problem.last_step // prunings)

    def on_step(self, model: nn.Module, epoch: float) -> None:
        """Prune to the number of `Problem.line` every `every` steps, and to the budget before the last step."""
        step, last = self.problem.step(epoch), self.problem.last_step
        if step == last or (0 < step < last and step % self.every == 0):
            self._prune(int(self.problem.line(step)), step == last)

    def _prune(self, total: int, last: bool) -> None:
        sites = self._sites()
        chosen = self.top({name: module.scores() for name, module in sites.items()}, total)
        for name, module in sites.items():
            mask = chosen[name]
            if self.problem.granularity == "channel" and not last:
                # A channel that is only partly in the mask is kept whole until the last pruning. Otherwise every
                # pruning would leave one such channel.
                mask = mask.reshape(len(mask), -1).any(1).view(-1, *(1,) * (mask.dim() - 1)).expand_as(mask)
            module.prune(mask & module.mask)

    def _sites(self) -> dict[str, ScoredReLU]:
        return {name: m for name, m in masked_sites(self.model).items() if isinstance(m, ScoredReLU)}

    def on_epoch_end(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """The number of ReLUs left."""
        return {"relus_left": float(sum(int(m.mask.sum()) for m in masked_sites(model).values()))}

    def masks(self) -> dict[str, Tensor]:
        """The masks of the positions that are left."""
        return {name: module.mask for name, module in self._sites().items()}
