"""Conversion of PyTorch's pools to the few pooling operations of a `Graph`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from shoal.graph.graph import Chain, unknown

MAX_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
AVG_OPTIONS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
"""Options of PyTorch's pools in the order of their arguments, after the input."""


def pair(value: Any) -> list[int]:
    """[vertical, horizontal] from such a pair, or from one number for both directions."""
    return [int(v) for v in value] if isinstance(value, (tuple, list)) and len(value) > 1 else [_single(value)] * 2


def _single(value: Any) -> int:
    return int(value[0]) if isinstance(value, (tuple, list)) else int(value)


def max_pool(options: Mapping[str, Any]) -> Chain:
    """The operations of a max pool with PyTorch's `options`."""
    if options.get("return_indices"):
        return (unknown("max_pool2d with return_indices"),)
    kernel = pair(options["kernel_size"])
    attrs = {"kernel": kernel, "stride": pair(options.get("stride") or kernel)}
    attrs |= {"padding": pair(options.get("padding") or 0), "dilation": pair(options.get("dilation") or 1)}
    return (("max_pool2d", attrs | {"ceil_mode": bool(options.get("ceil_mode"))}, {}),)


def avg_pool(options: Mapping[str, Any], before: tuple[int, ...], after: tuple[int, ...]) -> Chain:
    """The operations of an average pool with PyTorch's `options`.

    `before` and `after` are the [C, H, W] shapes of its input and result. Zero padding becomes a separate ``pad``.
    """
    kernel = pair(options["kernel_size"])
    stride, (down, right) = pair(options.get("stride") or kernel), pair(options.get("padding") or 0)
    if options.get("divisor_override"):
        return (unknown("avg_pool2d with divisor_override"),)
    if (down or right) and options.get("count_include_pad") is False:
        return (unknown("avg_pool2d with padding and count_include_pad=False"),)
    sizes = zip(before[1:], (down, right), kernel, stride, strict=True)
    # PyTorch divides a window that reaches beyond the padding by a smaller count.
    if tuple((n + 2 * p - k) // s + 1 for n, p, k, s in sizes) != after[1:]:
        return (unknown("avg_pool2d with ceil_mode where it adds windows"),)
    pool: Chain = (("avg_pool2d", {"kernel": kernel, "stride": stride}, {}),)
    return (("pad", {"pads": [right, right, down, down]}, {}), *pool) if down or right else pool


def adaptive_pool(op: str, size: Any, before: tuple[int, ...]) -> Chain:
    """The operations of an adaptive pool from `before` [C, H, W] to `size`; `op` is ``avg_pool2d`` or ``max_pool2d``.

    If its windows differ in size or spacing, a ``take`` first copies their values so that an ordinary pool fits.
    """
    wanted = [n if s is None else int(s) for s, n in zip(_sides(size), before[1:], strict=True)]
    if wanted == [1, 1] and op == "avg_pool2d":
        return (("mean", {"keepdim": True}, {}),)
    axes = [_adaptive_axis(op, n, count) for n, count in zip(before[1:], wanted, strict=True)]
    index, kernel, stride = (list(column) for column in zip(*axes, strict=True))
    taken: Chain = (("take", {"index": [None, *index]}, {}),) if index != [None, None] else ()
    if kernel == stride == [1, 1]:
        return taken or (("identity", {}, {}),)
    pool = max_pool({"kernel_size": kernel, "stride": stride})
    return (*taken, *(pool if op == "max_pool2d" else ((op, {"kernel": kernel, "stride": stride}, {}),)))


def _sides(size: Any) -> tuple[Any, Any]:
    return tuple(size) if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)


def _adaptive_axis(op: str, size: int, count: int) -> tuple[list[int] | None, int, int]:
    """(positions to take first or None, kernel, stride) along one axis.

    PyTorch's window i is [floor(i size / count), ceil((i + 1) size / count)). Values are repeated until all windows
    have the same size: for a mean, every value of a window equally often; for a maximum, the window's last value.
    """
    windows = [list(range(i * size // count, -(-(i + 1) * size // count))) for i in range(count)]
    lengths = {len(w) for w in windows}
    steps = {b[0] - a[0] for a, b in itertools.pairwise(windows)} or {len(windows[0])}
    if len(lengths) == len(steps) == 1 and min(steps) > 0:
        return None, lengths.pop(), steps.pop()
    if op == "max_pool2d":
        kernel = max(lengths)
        return [p for w in windows for p in (w + w[-1:] * kernel)[:kernel]], kernel, kernel
    kernel = math.lcm(*lengths)
    return [p for w in windows for p in w for _ in range(kernel // len(w))], kernel, kernel
