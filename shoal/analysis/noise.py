"""Flat minima (section 5.1): how Gaussian noise on the parameters changes accuracy and loss."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.outputs import forward


def noise_curve(
    model: nn.Module, images: Tensor, labels: Tensor, levels: Sequence[float], draws: int = 3, seed: int = 0
) -> list[dict[str, float]]:
    """Rows for each standard deviation in `levels` and each exit: accuracy in percent and mean cross-entropy.

    Noise is added to every parameter of a copy in eval mode; its batch statistics are unchanged. Results are means over
    `draws`; a level of 0 is evaluated once. `images` [N, C, H, W] are normalised, `labels` are int64 [N]. Raises
    ShoalError when a level is negative, or there are no levels or no draws.
    """
    if draws < 1 or not levels or min(levels) < 0:
        raise ShoalError(
            f"found noise levels {list(levels)} and {draws} draws; need levels of 0 or more, and at least one draw"
        )
    generator, rows = torch.Generator().manual_seed(seed), []
    for level in levels:
        drawn = [_judged(_noisy(model, level, generator), images, labels) for _ in range(draws if level else 1)]
        mean = torch.stack(drawn).mean(0)
        for exit, (accuracy, loss) in enumerate(mean.tolist()):
            rows.append({"noise": level, "exit": exit, "accuracy": accuracy, "loss": loss})
    return rows


@torch.no_grad()
def _noisy(model: nn.Module, level: float, generator: torch.Generator) -> nn.Module:
    noisy = copy.deepcopy(model).eval()
    for parameter in noisy.parameters():
        # Drawn on the CPU, so that a seed gives the same noise on every device.
        parameter.add_(level * torch.randn(parameter.shape, generator=generator).to(parameter))
    return noisy


@torch.no_grad()
def _judged(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 250) -> Tensor:
    """Accuracy in percent and mean cross-entropy of each exit: float64 [exits, 2]."""
    total: Tensor | None = None
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        logits = [z.double() for z in forward(model, x).logits]
        rows = [torch.stack([100.0 * (z.argmax(1) == y).sum(), F.cross_entropy(z, y, reduction="sum")]) for z in logits]
        sums = torch.stack(rows)
        total = sums if total is None else total + sums
    assert total is not None
    return total / len(labels)
