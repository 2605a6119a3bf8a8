"""Whether a traced network computes what the module itself does."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from shoal.errors import ShoalError
from shoal.surgery import shapes


def check_trace(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise ShoalError unless the traced model gives the model's own logits for an image of noise."""
    traced, own = shapes(model, shape), copy.deepcopy(model).eval()
    device = next((p.device for p in own.parameters()), torch.device("cpu"))
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        # Copies: a network may change its input in place.
        a, b = (list(y) if isinstance(y, (tuple, list)) else [y] for y in (own(image.clone()), traced(image.clone())))
    close = partial(torch.allclose, rtol=1e-3, atol=1e-4, equal_nan=True)
    if len(a) != len(b) or not all(close(x, y) for x, y in zip(a, b, strict=True)):
        raise ShoalError(
            f"found that {type(model).__name__} computes something else once traced; need a forward pass without "
            "hidden state; look for values that are changed in place (+=) and read again under another name"
        )
