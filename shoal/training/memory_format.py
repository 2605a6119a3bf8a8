"""The memory format in which a network trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from shoal.training.settings import Settings

BLOCK = 16
"""Input channels that oneDNN's convolutions process together: 8 with AVX2, 16 with AVX-512."""


def suit(settings: Settings, network: nn.Module) -> Settings:
    """The settings, with `channels_last` off if the network cannot be trained in that format on a CPU.

    In channels_last, oneDNN's backward pass of a strided 1x1 convolution writes beyond its buffer when the input has
    fewer channels than a block (uxlfoundation/oneDNN issue 6035): weights come out wrong, or the process aborts.
    """
    on_cpu = torch.device(settings.device).type == "cpu"
    broken = settings.channels_last and on_cpu and _has_few_inputs(network)
    return replace(settings, channels_last=False) if broken else settings


@contextmanager
def compiled_layout(settings: Settings) -> Iterator[None]:
    """While a step is compiled: the compiler may choose channels_last only where the settings allow it."""
    if settings.channels_last:
        yield
        return
    from torch._inductor import config  # takes a second to import

    with config.patch(layout_optimization=False):
        yield


def _has_few_inputs(network: nn.Module) -> bool:
    """Whether a strided 1x1 convolution reads fewer channels than a block.

    A slimmable network counts at its narrowest width.
    """
    narrowest = min(getattr(network, "widths", (1.0,)))
    pointwise = (m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))
    return any(max(conv.stride) > 1 and conv.in_channels * narrowest < BLOCK for conv in pointwise)
