"""Coordinate descent (arXiv 2511.11781): drop the random block of ReLUs that hurts least, and train on."""

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
"""Drops in a search, and random blocks that are tried for each."""
HEAD_START = 2
"""The search begins with this many times the budget."""
PROBE = 256
"""Training images on which candidates are judged, at least."""


class CoordinateDescent(Magnitude):
    """From magnitude masks at twice the budget on: of eight random blocks of ReLUs the one that hurts least goes.

    Blocks are sets of positions drawn from all sites alike. Each is judged by cross-entropy plus distillation on a
    probe batch of training images; the weights train in between, and the blocks have even sizes.
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
        """ReLUs at the start."""
        return min(HEAD_START * self.problem.total, self.problem.everything)

    def on_step(self, model: nn.Module, epoch: float) -> None:
        """Drop blocks down to an even line, which ends at the budget."""
        step, last = self.problem.step(epoch), self.problem.last_step
        if step == last or (0 < step < last and step % self.every == 0):
            part = step / last if last else 1.0
            first, total = self.first_total(), self.problem.total
            self._drop(model, first - int((first - total) * part), step)

    def _drop(self, model: nn.Module, total: int, step: int) -> None:
        """Leave `total` ReLUs: the best of the candidates."""
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
        """The masks without `count` of their positions, drawn from all sites alike."""
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
        """What is left."""
        return {name: module.mask for name, module in masked_sites(self.model).items()}
