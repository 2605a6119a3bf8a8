"""Operations that users write as several calls, rewritten as one call.

The cases are: channel shuffle written as view, transpose, view; a mean over width and then over height; and squeezing
the result of a global pool.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from shoal.surgery.sizes import RESHAPES, arg, keeps_images, operands

TRANSPOSES = ("transpose", torch.transpose, torch.swapaxes, "swapaxes")
PERMUTATIONS = ("permute", torch.permute)
SQUEEZES = ("squeeze", torch.squeeze)
MEANS = ("mean", torch.mean)
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)

Known = Mapping[fx.Node, Any]


def settle_in_place(traced: fx.GraphModule) -> None:
    """Redirect readers of a value that was changed in place to the node that changed it.

    Needed because a `Graph` has no in-place operations, and normalised ReLUs do not work in place.
    """
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node in list(traced.graph.nodes):
        if _is_in_place(traced, node):
            source = operands(node)[0]
            for reader in [u for u in source.users if order[u] > order[node]]:
                reader.replace_input_with(source, node)


def _is_in_place(traced: fx.GraphModule, node: fx.Node) -> bool:
    if not operands(node):
        return False
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    named = name.endswith("_") and not name.endswith("__")
    return node.op.startswith("call") and (named or node.target in IN_PLACE or bool(node.kwargs.get("inplace")))


def join_idioms(traced: fx.GraphModule, known: Known) -> None:
    """Rewrite each idiom as one call, in place.

    Needs the shapes that `sizes.Shapes` records and the sizes that `sizes.fix_sizes` returns (`known`).
    """
    for node in list(traced.graph.nodes):
        for find in (_channel_shuffle, _global_mean, _squeezed):
            found = find(node, known)
            if found is not None:
                function, arguments = found
                chain = operands(node)[:1]
                node.op, node.target, node.args, node.kwargs = "call_function", function, arguments, {}
                _erase_unread(traced, chain)
                break


def _erase_unread(traced: fx.GraphModule, nodes: list[fx.Node]) -> None:
    while nodes and not nodes[0].users and nodes[0].op != "placeholder":
        node, nodes = nodes[0], operands(nodes[0])[:1]
        traced.graph.erase_node(node)


Meant = tuple[Callable[..., Any], tuple[Any, ...]]


def _channel_shuffle(node: fx.Node, known: Known) -> Meant | None:
    if node.target not in RESHAPES or not keeps_images(node, known):
        return None
    swapped = operands(node)[0]
    while swapped.target == "contiguous":
        swapped = operands(swapped)[0]
    if not _swaps_channels(swapped):
        return None
    cut = operands(swapped)[0]
    if cut.target not in RESHAPES or not keeps_images(cut, known):
        return None
    source, shape = operands(cut)[0], node.meta["shape"]
    groups = cut.meta["shape"][0]
    same = source.meta["shape"] == shape and cut.meta["shape"] == (groups, shape[0] // groups, *shape[1:])
    return (torch.channel_shuffle, (source, groups)) if same else None


def _swaps_channels(node: fx.Node) -> bool:
    rank = 1 + len(node.meta["shape"])
    given: Any = node.args[1:]
    if node.target in TRANSPOSES and len(given) == 2:
        return {int(d) % rank for d in given} == {1, 2}
    if node.target in PERMUTATIONS:
        given = given if len(given) > 1 else arg(node, 1, "dims", ())
        return tuple(given) == (0, 2, 1, *range(3, rank))
    return False


def _global_mean(node: fx.Node, known: Known) -> Meant | None:
    if node.target not in MEANS or len(node.meta["shape"]) != 1:
        return None
    inner = operands(node)[0]
    if inner.target not in MEANS or len(inner.meta["shape"]) != 2:
        return None
    source = operands(inner)[0]
    both = [arg(inner, 1, "dim"), arg(node, 1, "dim")]
    kept = isinstance(both[0], int) and isinstance(both[1], int) and len(source.meta["shape"]) == 3
    kept = kept and both[0] % 4 in (2, 3) and both[1] % 3 == 2
    return (torch.mean, (source, (2, 3))) if kept else None


def _squeezed(node: fx.Node, known: Known) -> Meant | None:
    if node.target not in SQUEEZES or len(node.meta["shape"]) != 1:
        return None
    source = node
    while source.target in SQUEEZES and _dims(source) and 0 not in _dims(source):
        source = operands(source)[0]
    shape = source.meta["shape"]
    return (torch.flatten, (source, 1)) if len(shape) == 3 and shape[1:] == (1, 1) else None


def _dims(node: fx.Node) -> set[int]:
    """Dimensions that a squeeze names, counted from 0; empty if it names none.

    A squeeze without a dimension would also remove the batch dimension for a batch of one image.
    """
    dim = arg(node, 1, "dim")
    rank = 1 + len(operands(node)[0].meta["shape"])
    return {int(d) % rank for d in (dim if isinstance(dim, (tuple, list)) else [] if dim is None else [dim])}
