"""Coordinate descent (arXiv 2511.11781): repeatedly remove the random block of ReLUs that raises the loss least."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from shoal.distillation.losses import kl_divergence
from shoal.outputs import Outputs, forward
from shoal.reduction.learners.magnitude import Magnitude
from shoal.reduction.learners.search import Problem
from shoal.reduction.masks import masked_sites
from shoal.training.objective import cross_entropy

DROPS, CANDIDATES = 32, 8
"""Number of removals in a search, and of random blocks that are tried for each."""
HEAD_START = 2
"""The search begins with this factor times the budget."""
PROBE = 256
"""Minimum number of training images on which candidates are compared."""


class CoordinateDescent(Magnitude):
    """Starts from magnitude masks with twice the budget and removes the best of eight random blocks of ReLUs at a time.

    A block is a random set of positions, drawn uniformly from all sites; all blocks have about the same size. The best
    block is the one whose removal gives the smallest cross-entropy plus distillation loss on a fixed batch of training
    images. The weights are trained between removals.
    """

    granularities = ("pixel",)

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        epochs = problem.schedule.epochs
        self.select_from = min(int(0.75 * epochs), epochs - 1)
        self.hooks, self.every = (self,), max(1, problem.last_step // DROPS)
        pairs = list(islice(problem.batches(), -(-PROBE // len(next(problem.batches())[1]))))
        self.images, self.labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        with torch.no_grad():
            teacher = problem.teacher.eval()
            self.taught = forward(teacher, self.images)

    def first_total(self) -> int:
        """The number of ReLUs at the start."""
        return min(HEAD_START * self.problem.total, self.problem.everything)

    def on_step(self, model: nn.Module, epoch: float) -> None:
        """Remove ReLUs down to a line that falls evenly to the budget."""
        step, last = self.problem.step(epoch), self.problem.last_step
        if step == last or (0 < step < last and step % self.every == 0):
            fraction = step / last if last else 1.0
            first, total = self.first_total(), self.problem.total
            self._drop(model, first - int((first - total) * fraction), step)

    def _drop(self, model: nn.Module, total: int, step: int) -> None:
        """Remove the best of the candidate blocks, so that `total` ReLUs are left."""
        sites = masked_sites(model)
        now = {name: module.mask.clone() for name, module in sites.items()}
        count = sum(int(mask.sum()) for mask in now.values()) - total
        if count <= 0:
            return
        generator = torch.Generator().manual_seed(self.problem.seed * 1_000_003 + step)
        tried = [self._without(now, count, generator) for _ in range(CANDIDATES)]
        losses = [self._loss(model, masks) for masks in tried]
        self._set(model, tried[losses.index(min(losses))])

    def _without(self, masks: dict[str, Tensor], count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The masks without `count` of their positions, drawn uniformly from all sites."""
        flat = torch.cat([mask.flatten() for mask in masks.values()])
        alive = flat.nonzero()[:, 0]
        gone = torch.randperm(len(alive), generator=generator)[:count]
        flat[alive[gone.to(alive.device)]] = False
        parts = flat.split([mask.numel() for mask in masks.values()])
        return {name: part.view(masks[name].shape) for name, part in zip(masks, parts, strict=True)}

    def _loss(self, model: nn.Module, masks: dict[str, Tensor]) -> float:
        self._set(model, masks)
        training = model.training
        model.eval()
        with torch.no_grad():
            found = forward(model, self.images)
        model.train(training)
        return float(self._judge(found))

    def _judge(self, found: Outputs) -> Tensor:
        soft = kl_divergence(self.taught.final, found.final, 4.0)
        return cross_entropy().loss(found, None, self.labels) + soft

    def _set(self, model: nn.Module, masks: dict[str, Tensor]) -> None:
        for name, module in masked_sites(model).items():
            module.set_mask(masks[name])

    def masks(self) -> dict[str, Tensor]:
        """The masks of the positions that are left."""
        return {name: module.mask for name, module in masked_sites(self.model).items()}
