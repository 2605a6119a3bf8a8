"""Masks by magnitude: ReLUs stay where they change the activations most; nothing is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shoal.reduction.learners.search import Problem
from shoal.reduction.learners.senet import Random
from shoal.reduction.masks import masked_sites, top_k


def clamped_means(model: nn.Module, problem: Problem) -> dict[str, Tensor]:
    """Mean of |min(x, 0)|, the change that a ReLU makes, over `problem.batches`; float64 [C, H, W] by masked site.

    `model` runs in eval mode and is then set back to its own mode.
    """
    training, sites, count = model.training, masked_sites(model), 0
    sums = {name: torch.zeros(m.mask.shape, dtype=torch.float64, device=m.mask.device) for name, m in sites.items()}
    handles = [m.register_forward_pre_hook(_adder(sums[name])) for name, m in sites.items()]
    model.eval()
    try:
        with torch.no_grad():
            for x, _ in problem.batches():
                model(x)
                count += len(x)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return {name: total / max(1, count) for name, total in sums.items()}


class Magnitude(Random):
    """Budgets by sensitivity; at each site the ReLUs that change the teacher's activations most stay."""

    from_teacher = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        # The means are measured with all ReLUs in place.
        for module in masked_sites(self.model).values():
            module.set_mask(torch.ones_like(module.mask))
        means = clamped_means(self.model, problem)
        for name, module in masked_sites(self.model).items():
            module.set_mask(top_k(means[name], self.budget.counts[name], problem.granularity))


def _adder(total: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total.sub_(inputs[0].clamp(max=0).double().sum(0))

    return hook
