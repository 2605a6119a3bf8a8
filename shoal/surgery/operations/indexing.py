"""Slices, chunks and splits in a forward pass, converted to `Graph` operations."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from shoal.graph.graph import Lowered, unknown
from shoal.surgery.sizes import arg, calls

DIVIDING = (torch.chunk, torch.split, torch.tensor_split, "chunk", "split", "tensor_split")
"""Calls that split a tensor and return a tuple of the pieces."""


def take(index: list[list[int] | None]) -> Lowered:
    """A ``take`` operation: `index` lists the positions to keep in each dimension; None keeps all of them."""
    return "take", {"index": index}, {}


def is_dividing(node: fx.Node) -> bool:
    """Whether `node` splits [N, C, ...] along the channels and every reader picks one piece by a fixed number."""
    if not calls(node, DIVIDING) or "parts" not in node.meta:
        return False
    rank = 1 + len(node.all_input_nodes[0].meta["shape"])
    numbered = all(calls(u, (operator.getitem,)) and isinstance(u.args[1], int) for u in node.users)
    return arg(node, 2, "dim", 0) % rank == 1 and numbered


SELECTIONS = (torch.index_select, "index_select")
"""Calls that choose positions along one dimension."""


def lower_index(traced: fx.GraphModule, node: fx.Node) -> Lowered:
    """Convert an indexing, either of one tensor or of the pieces that a split along the channels returned.

    Positions may be slices, and along one dimension a list of numbers or a buffer of `traced`.
    """
    if calls(node, SELECTIONS):
        return _selection(traced, node)
    source, index = node.args
    assert isinstance(source, fx.Node)
    if is_dividing(source):
        return _part(source, int(index))  # type: ignore[arg-type]
    if "parts" in source.meta:
        name = getattr(source.target, "__name__", source.target)
        return unknown(f"part {index} of {name}" if calls(source, DIVIDING) else f"result {index} of {name}")
    shape = source.meta["shape"]
    parts = _whole(index, len(shape))
    if len(shape) == 3 and parts == [slice(None), slice(None), 0, 0] and shape[1:] == (1, 1):
        return "flatten", {}, {}
    chosen = [_positions(traced, part, size) for part, size in zip(parts[1:], shape, strict=False)]
    listed = [p for p in parts[1:] if not isinstance(p, slice)]
    if parts[:1] != [slice(None)] or None in chosen or len(parts) > 1 + len(shape) or len(listed) > 1:
        return unknown(f"indexing [{index}]")
    if listed:
        chosen += [list(range(size)) for size in shape[len(chosen) :]]
        return take([None if p == list(range(n)) else p for p, n in zip(chosen, shape, strict=True)])
    return _slices(parts[1:], shape)


def _whole(index: Any, rank: int) -> list[Any]:
    """The parts of an index of a tensor with `rank` dimensions after the batch, with `...` written out."""
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis not in [p for p in parts if not isinstance(p, fx.Node)]:
        return parts
    place = next(i for i, p in enumerate(parts) if p is Ellipsis)
    return [*parts[:place], *[slice(None)] * (2 + rank - len(parts)), *parts[place + 1 :]]


def _selection(traced: fx.GraphModule, node: fx.Node) -> Lowered:
    shape = node.all_input_nodes[0].meta["shape"]
    dim = int(arg(node, 1, "dim")) % (1 + len(shape))
    chosen = _positions(traced, arg(node, 2, "index"), shape[dim - 1]) if dim else None
    if chosen is None:
        return unknown("index_select of images, or with positions computed in forward")
    return take([chosen if i == dim - 1 else None for i in range(len(shape))])


def _positions(traced: fx.GraphModule, part: Any, size: int) -> list[int] | None:
    """The positions, counted from 0, that `part` of an index chooses of `size`; None if they are not fixed."""
    if isinstance(part, slice):
        return list(range(*part.indices(size))) if _is_fixed(part) else None
    if isinstance(part, fx.Node) and part.op == "get_attr":
        held = operator.attrgetter(str(part.target))(traced)
        if not isinstance(held, Tensor) or held.dim() != 1 or held.is_floating_point():
            return None
        part = (held.nonzero()[:, 0] if held.dtype == torch.bool else held).tolist()
    if not isinstance(part, (list, tuple)) or not part or any(type(p) is not int for p in part):
        return None
    return [p % size for p in part] if all(-size <= p < size for p in part) else None


def is_index(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether every reader of the model attribute `node` chooses positions by it, and so needs no node for it."""
    readers = [u for u in node.users if calls(u, (operator.getitem, *SELECTIONS))]
    return len(readers) == len(node.users) > 0 and all(lower_index(traced, u)[0] != "unknown" for u in readers)


def _is_fixed(part: slice) -> bool:
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
