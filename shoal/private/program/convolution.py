"""Convolutions of float64 integers, shared among threads that sleep while there is nothing to do.

The threads of OpenMP, which PyTorch uses, keep a core busy while they wait for the next product. A server whose next
product comes some milliseconds later, after an exchange, would take that core from its other sessions.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_PLANE = 256
"""Outputs per channel up to which PyTorch multiplies float64 in channels_last format at least as fast."""
LEAST_PRODUCTS = 1 << 22
"""Products of a part that is worth a thread: they take about 0.3 ms, waking a thread 0.05 to 0.1 ms."""


class Team:
    """Runs tasks on `threads` threads: the caller's and `threads` - 1 more. Several callers may use it at once."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._others = ThreadPoolExecutor(threads - 1) if threads > 1 else None

    def run(self, tasks: list[Callable[[], object]]) -> None:
        """Run all tasks. Returns when they have ended, and raises the error of one that failed."""
        mine, others = tasks[0], tasks[1:]
        if self._others is None or not others:
            for task in tasks:
                task()
            return
        running = [self._others.submit(task) for task in others]
        mine()
        for future in running:
            future.result()


class Convolution:
    """float64 [N, C, H, W] and a weight [O, C/groups, kh, kw] to int64 [N, O, rows, columns].

    All sums must be exact in float64. `attrs` holds stride, padding, dilation (pairs) and groups.
    """

    def __init__(self, attrs: dict[str, Any], plane: int | None = None, team: Team | None = None) -> None:
        self.stride, self.padding, self.dilation = (tuple(attrs[k]) for k in ("stride", "padding", "dilation"))
        self.groups, self.team = attrs["groups"], team or Team()
        small = plane is not None and plane <= SMALL_PLANE and self.groups == 1
        self.format = torch.channels_last if small else torch.contiguous_format
        """The format that `weight` should have. It depends on `plane`, the number of outputs per channel."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        shape = self._shape(x, weight)
        parts = min(self.team.threads, shape.numel() * weight[0].numel() // LEAST_PRODUCTS)
        if parts < 2 or self.groups > 1:
            return self._whole(x, weight).to(torch.int64, memory_format=torch.contiguous_format)
        out = torch.empty(shape, dtype=torch.int64)
        if self.format == torch.channels_last:
            self.team.run(self._by_channels(x.contiguous(memory_format=self.format), weight, out, parts))
        else:
            self.team.run(self._by_rows(x, weight, out, parts))
        return out

    def _shape(self, x: Tensor, weight: Tensor) -> torch.Size:
        each = zip(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        planes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each]
        return torch.Size((x.shape[0], weight.shape[0], *planes))

    def _whole(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def _by_channels(self, x: Tensor, weight: Tensor, out: Tensor, parts: int) -> list[Callable[[], object]]:
        """Small planes have large weights, so each part has its own output channels."""

        def part(i: int, j: int) -> None:
            out[:, i:j].copy_(self._whole(x, weight[i:j]))

        return [lambda i=i, j=j: part(i, j) for i, j in _ranges(out.shape[1], parts)]  # type: ignore[misc]

    def _by_rows(self, x: Tensor, weight: Tensor, out: Tensor, parts: int) -> list[Callable[[], object]]:
        """Large planes take much unfolding, so each part has its own rows, and those of the input that it reads."""
        (up, side), (down, _), (apart, _) = self.padding, self.stride, self.dilation
        padded, reach = F.pad(x, (0, 0, up, up)), apart * (weight.shape[2] - 1) + 1

        def part(i: int, j: int) -> None:
            rows = padded[:, :, i * down : (j - 1) * down + reach]
            out[:, :, i:j].copy_(F.conv2d(rows, weight, None, self.stride, (0, side), self.dilation))

        return [lambda i=i, j=j: part(i, j) for i, j in _ranges(out.shape[2], parts)]  # type: ignore[misc]


def _ranges(count: int, parts: int) -> list[tuple[int, int]]:
    ends = [count * i // parts for i in range(parts + 1)]
    return [(i, j) for i, j in pairwise(ends) if j > i]
