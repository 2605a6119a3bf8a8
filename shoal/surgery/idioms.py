"""Operations that users write as several calls, rewritten as one call.

The cases are: channel shuffle written as view, transpose, view; a mean over width and then over height, or over both
after a view or flatten(2); and squeezing the result of a global pool.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from shoal.surgery.sizes import RESHAPES, arg, calls, keeps_images, operands

TRANSPOSES = ("transpose", torch.transpose, torch.swapaxes, "swapaxes")
PERMUTATIONS = ("permute", torch.permute)
SQUEEZES = ("squeeze", torch.squeeze)
MEANS = ("mean", torch.mean)
FLATTENS = ("flatten", torch.flatten)
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


ALIASES = {"axis": "dim", "keepdims": "keepdim"}
"""NumPy's names of options, which PyTorch accepts too."""


def rename_options(traced: fx.GraphModule) -> None:
    """Give options with a name of NumPy's (`axis`, `keepdims`) PyTorch's name, in place."""
    for node in traced.graph.nodes:
        if node.op in ("call_function", "call_method"):
            node.kwargs = {ALIASES.get(name, name): value for name, value in node.kwargs.items()}


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
    if not calls(node, RESHAPES) or not keeps_images(node, known):
        return None
    swapped = operands(node)[0]
    while calls(swapped, ("contiguous",)):
        swapped = operands(swapped)[0]
    if not _swaps_channels(swapped):
        return None
    cut = operands(swapped)[0]
    if not calls(cut, RESHAPES) or not keeps_images(cut, known):
        return None
    source, shape = operands(cut)[0], node.meta["shape"]
    groups = cut.meta["shape"][0]
    same = source.meta["shape"] == shape and cut.meta["shape"] == (groups, shape[0] // groups, *shape[1:])
    return (torch.channel_shuffle, (source, groups)) if same else None


def _swaps_channels(node: fx.Node) -> bool:
    rank = 1 + len(node.meta["shape"])
    given: Any = node.args[1:]
    if calls(node, TRANSPOSES) and len(given) == 2:
        return {int(d) % rank for d in given} == {1, 2}
    if calls(node, PERMUTATIONS):
        given = given if len(given) > 1 else arg(node, 1, "dims", ())
        return tuple(given) == (0, 2, 1, *range(3, rank))
    return False


def _global_mean(node: fx.Node, known: Known) -> Meant | None:
    if not calls(node, MEANS) or arg(node, 3, "dtype") is not None:
        return None
    inner, last = operands(node)[0], _single(arg(node, 1, "dim"))
    source = operands(inner)[0] if operands(inner) else node
    if last is None or len(source.meta.get("shape", ())) != 3:
        return None
    kept, kept_inside = (bool(arg(n, 2, "keepdim", False)) for n in (node, inner))
    if calls(inner, MEANS) and kept == kept_inside:
        first = _single(arg(inner, 1, "dim"))
        rank = 4 if kept else 3
        both = first is not None and {first % 4, last % rank} in (({2, 3},) if kept else ({2, 3}, {2}))
        return (torch.mean, (source, (2, 3), kept)) if both else None
    merged = not kept and last % 3 == 2 and _merges_positions(inner, source, known)
    return (torch.mean, (source, (2, 3))) if merged else None


def _single(dim: Any) -> int | None:
    """The one dimension that `dim` names, or None."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return dim if isinstance(dim, int) else None


def _merges_positions(node: fx.Node, source: fx.Node, known: Known) -> bool:
    """Whether `node` reshapes `source` [N, C, H, W] to [N, C, HW]."""
    (channels, high, wide), shape = source.meta["shape"], node.meta["shape"]
    if shape != (channels, high * wide) or source.meta["batch"] != (1,):
        return False
    if calls(node, FLATTENS):
        return int(arg(node, 1, "start_dim", 0)) % 4 == 2 and int(arg(node, 2, "end_dim", -1)) % 4 == 3
    return calls(node, RESHAPES) and keeps_images(node, known)


def _squeezed(node: fx.Node, known: Known) -> Meant | None:
    if not calls(node, SQUEEZES) or len(node.meta["shape"]) != 1:
        return None
    source = node
    while calls(source, SQUEEZES) and _dims(source) and 0 not in _dims(source):
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
