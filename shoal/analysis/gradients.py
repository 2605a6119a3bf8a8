"""Vanishing gradients (section 5.5, Fig. 15): their size in each convolution, by the exit that they come from."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.outputs import forward

ALL = "all"
"""Value of `exit` in the rows for the sum of all exits' losses."""


def gradient_magnitudes(
    model: nn.Module, images: Tensor, labels: Tensor, batch: int = 128, seed: int = 0
) -> list[dict[str, object]]:
    """Rows for each convolution and exit: the mean absolute gradient of the weights under the exit's cross-entropy.

    They are means over batches of normalised `images` [N, C, H, W], with `labels` (int64 [N]), for a copy of the
    network in training mode, so with batch statistics. Exits count from 0, the weakest; `ALL` stands for the sum of
    their losses. A layer that an exit does not depend on has 0. `seed` sets dropout. A last batch of one image is left
    out, because it has no batch statistics. Raises ShoalError when the network has no convolution, or there are fewer
    than two images.
    """
    trained = copy.deepcopy(model).train()
    layers = {name: m for name, m in trained.named_modules() if isinstance(m, nn.Conv2d)}
    if not layers:
        raise ShoalError("found no convolution in the network; need one or more to study their gradients")
    sums: dict[tuple[str, int | str], Tensor] = {}
    batches = [(x, y) for x, y in zip(images.split(batch), labels.split(batch), strict=True) if len(x) > 1]
    if not batches:
        raise ShoalError("found one image to study gradients with; need two or more for batch statistics; take more")
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        for x, y in batches:
            for exit, values in _of_batch(trained, list(layers.values()), x, y).items():
                for name, value in zip(layers, values, strict=True):
                    sums[name, exit] = sums.get((name, exit), torch.zeros(())) + value / len(batches)
    return [{"layer": name, "exit": exit, "gradient": float(value)} for (name, exit), value in sums.items()]


def _of_batch(model: nn.Module, layers: list[nn.Conv2d], x: Tensor, y: Tensor) -> dict[int | str, list[Tensor]]:
    """Mean absolute gradients of all `layers`, for each exit and for `ALL`."""
    losses: list[Tensor] = [F.cross_entropy(z, y) for z in forward(model, x).logits]
    targets: dict[int | str, Tensor] = {**dict(enumerate(losses)), ALL: torch.stack(losses).sum()}
    weights = [layer.weight for layer in layers]
    found = {}
    for exit, loss in targets.items():
        gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        found[exit] = [torch.zeros(()) if g is None else g.abs().mean().cpu() for g in gradients]
    return found
