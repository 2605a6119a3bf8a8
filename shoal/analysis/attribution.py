"""Integrated gradients (Sundararajan et al., ICML'17; section 5.3, Fig. 17): how much each pixel adds to a logit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.outputs import forward


def integrated_gradients(
    model: nn.Module, images: Tensor, baseline: Tensor, classes: Tensor, exit: int, steps: int = 64
) -> Tensor:
    """Attributions [N, C, H, W] of the logits of `classes` [N] at `exit` to the normalised `images` [N, C, H, W].

    The path is the straight line from `baseline` [C, H, W]; the integral is approximated by the midpoint rule with
    `steps` points. The attributions of an image add up to about the difference between its logit and the baseline's.
    The model is left in eval mode. Images are float32, classes int64. Raises ShoalError when `steps` is below 1.
    """
    if steps < 1:
        raise ShoalError(f"found {steps} steps; need 1 or more; 64, say")
    model.eval()
    total = torch.zeros_like(images)
    for k in range(steps):
        point = (baseline + (k + 0.5) / steps * (images - baseline)).requires_grad_()
        chosen = logit(model, point, classes, exit)
        total += torch.autograd.grad(chosen.sum(), point)[0]
    return (images - baseline) * total / steps


def logit(model: nn.Module, images: Tensor, classes: Tensor, exit: int) -> Tensor:
    """The logits [N] of `classes` (int64 [N]) at `exit`, for normalised `images` [N, C, H, W]."""
    return forward(model, images).logits[exit].gather(1, classes[:, None])[:, 0]
