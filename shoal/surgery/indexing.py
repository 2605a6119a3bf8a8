"""Slices, chunks and splits in a forward pass, converted to `Graph` operations."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from shoal.graph.graph import Lowered, unknown
from shoal.surgery.sizes import arg

DIVIDING = (torch.chunk, torch.split, torch.tensor_split, "chunk", "split", "tensor_split")
"""Calls that split a tensor and return a tuple of the pieces."""


def take(index: list[list[int] | None]) -> Lowered:
    """A ``take`` operation: `index` lists the positions to keep in each dimension; None keeps all of them."""
    return "take", {"index": index}, {}


def is_dividing(node: fx.Node) -> bool:
    """Whether `node` splits [N, C, ...] along the channels and every reader picks one piece by a fixed number."""
    if node.op == "output" or node.target not in DIVIDING or "parts" not in node.meta:
        return False
    rank = 1 + len(node.all_input_nodes[0].meta["shape"])
    numbered = all(u.target is operator.getitem and isinstance(u.args[1], int) for u in node.users)
    return arg(node, 2, "dim", 0) % rank == 1 and numbered


def lower_index(node: fx.Node) -> Lowered:
    """Convert an indexing, either of one tensor or of the pieces that a split along the channels returned."""
    source, index = node.args
    assert isinstance(source, fx.Node)
    if is_dividing(source):
        return _part(source, int(index))  # type: ignore[arg-type]
    if "parts" in source.meta:
        return unknown(f"part {index} of {getattr(source.target, '__name__', source.target)}")
    shape = source.meta["shape"]
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if len(shape) == 3 and parts == [slice(None), slice(None), 0, 0] and shape[1:] == (1, 1):
        return "flatten", {}, {}
    if parts[:1] != [slice(None)] or not all(map(_is_fixed, parts)) or len(parts) > 1 + len(shape):
        return unknown(f"indexing [{index}]")
    return _slices(parts[1:], shape)


def _is_fixed(part: Any) -> bool:
    if not isinstance(part, slice):
        return False
    return all(v is None or isinstance(v, int) for v in (part.start, part.stop, part.step))


def _part(divided: fx.Node, number: int) -> Lowered:
    sizes = [shape[0] for shape in divided.meta["parts"]]
    number %= len(sizes)
    start, rest = sum(sizes[:number]), len(divided.meta["parts"][0]) - 1
    return take([list(range(start, start + sizes[number])), *[None] * rest])


def _slices(parts: list[slice], shape: tuple[int, ...]) -> Lowered:
    parts = [*parts, *[slice(None)] * (len(shape) - len(parts))]
    if all(p == slice(None) for p in parts):
        return "identity", {}, {}
    if len(shape) == 3 and parts[0] == slice(None) and not any(p.start or p.stop for p in parts):
        return "subsample", {"stride": [p.step or 1 for p in parts[1:]]}, {}
    positions = [list(range(*p.indices(size))) for p, size in zip(parts, shape, strict=True)]
    return take([None if len(p) == size else p for p, size in zip(positions, shape, strict=True)])
