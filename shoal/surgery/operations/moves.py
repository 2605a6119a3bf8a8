"""Operations that only move or repeat values along single dimensions, converted to a ``take``.

They are flips, rolls, repetitions, borders that mirror or repeat the image, negative borders, and upsampling by the
nearest neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from shoal.graph.graph import Lowered
from shoal.surgery.operations.indexing import take
from shoal.surgery.sizes import arg, calls, operands

MOVES = (torch.flip, "flip", torch.roll, "roll", "expand", "repeat", "tile", torch.tile, torch.narrow, "narrow")
REPETITIONS = (torch.repeat_interleave, "repeat_interleave")
BORDERS = (nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
NEAREST = ("nearest", "nearest-exact")
"""Modes of upsampling that copy values."""


def lower_move(node: fx.Node, module: nn.Module | None = None) -> Lowered | None:
    """The ``take`` that computes what `node` does, a call of `module` if it calls one; None for all other nodes."""
    if not _only_moves(node, module):
        return None
    shape = operands(node)[0].meta["shape"]
    if module is not None:
        return moved(module, shape)
    given, options = list(node.args), dict(node.kwargs)
    if len(operands(node)) > 1 or not given or not isinstance(given[0], fx.Node):
        return None
    if node.op == "call_method":
        return moved(lambda x: getattr(x, str(node.target))(*given[1:], **options), shape)
    function: Callable[..., Tensor] = node.target  # type: ignore[assignment]
    return moved(lambda x: function(x, *given[1:], **options), shape)


def _only_moves(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        if isinstance(module, (nn.ZeroPad2d, nn.ConstantPad2d)):
            return min(module.padding) < 0 >= max(module.padding)
        return type(module) in BORDERS or (isinstance(module, nn.Upsample) and module.mode in NEAREST)
    if calls(node, (F.interpolate, F.upsample)):
        return arg(node, 3, "mode", "nearest") in NEAREST
    if calls(node, (F.pad,)):
        pads = arg(node, 1, "pad")
        return arg(node, 2, "mode", "constant") != "constant" or min(pads) < 0 >= max(pads)
    return calls(node, MOVES) or (calls(node, REPETITIONS) and isinstance(arg(node, 1, "repeats"), int))


def moved(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Lowered | None:
    """The ``take`` for a function of [N, *shape] that moves values along single dimensions; None if it does not.

    The function is asked where it takes the positions of each dimension from.
    """
    index: list[list[int] | None] = []
    for axis, size in enumerate(shape, start=1):
        view = [1] * (1 + len(shape))
        view[axis] = size
        grid = torch.arange(size, dtype=torch.float64).view(view).expand(1, *shape).contiguous()
        try:
            found = function(grid)
        except Exception:
            return None  # a message of the function itself was raised before, when the network ran
        if found.dim() != grid.dim() or found.shape[0] != 1:
            return None
        first: Any = found.transpose(0, axis).flatten(1)
        if not torch.equal(first, first[:, :1].expand_as(first)):
            return None
        positions = [round(v) for v in first[:, 0].tolist()]
        index.append(None if positions == list(range(size)) else positions)
    return take(index) if math.prod(shape) else None
