"""Operations that users write as several calls, rewritten as one call.

The cases are: channel shuffle written as view, transpose, view; a mean over width and then over height, or over both
after a view or flatten(2); and squeezing the result of a global pool.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from shoal.surgery.known_sizes import KnownSizes
from shoal.surgery.sizes import RESHAPES, arg, calls, keeps_images, operands

TRANSPOSES = ("transpose", torch.transpose, torch.swapaxes, "swapaxes")
PERMUTATIONS = ("permute", torch.permute)
SQUEEZES = ("squeeze", "squeeze_", torch.squeeze)
UNSQUEEZES = ("unsqueeze", torch.unsqueeze)
MEANS = ("mean", torch.mean)
FLATTENS = ("flatten", torch.flatten)
UNFLATTENS = ("unflatten", torch.unflatten)
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


def flatten_squeezed(graph: fx.Graph, sizes: KnownSizes | None) -> None:
    """Write squeeze() after a global pool as flatten(1), in place: it is meant to keep the images, one image too.

    `sizes` has the sizes of the images; nothing is changed without them.
    """
    if sizes is None or sizes.shape is None:
        return
    for node in graph.nodes:
        if calls(node, SQUEEZES) and len(node.args) == 1 and not node.kwargs:
            found = [tuple(getattr(value, "shape", ())) for value in sizes.for_batches(node.args[0])]
            if len(found[0]) == 4 and found[0][1] > 1 and found[0][2:] == (1, 1) and found[0][0] != found[1][0]:
                node.op, node.target, node.args = "call_function", torch.flatten, (node.args[0], 1)


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
    join_stacks(traced)
    mark_reshapes(traced)
    for node in list(traced.graph.nodes):
        for find in (_channel_shuffle, _global_mean, _squeezed, _kept_channel, _same_shape):
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


def join_stacks(traced: fx.GraphModule) -> None:
    """Write a sum or mean over tensors that were stacked for it as sums of two, in place."""
    graph = traced.graph
    for node in list(graph.nodes):
        if not calls(node, (*MEANS, "sum", torch.sum)) or not calls(operands(node)[0], (torch.stack,)):
            continue
        stack = operands(node)[0]
        parts, dim = list(stack.args[0]), _single(arg(node, 1, "dim"))  # type: ignore[arg-type]
        rank = 1 + len(stack.meta["shape"])
        if dim is None or dim % rank != int(arg(stack, 1, "dim", 0)) % rank or arg(node, 2, "keepdim", False):
            continue
        with graph.inserting_before(node):
            total = parts[0]
            for part in parts[1:]:
                total = _made(graph, operator.add, (total, part), node)
            if calls(node, MEANS):
                total = _made(graph, operator.truediv, (total, len(parts)), node)
        node.replace_all_uses_with(total)
        _erase_unread(traced, [node])


def _made(graph: fx.Graph, function: Callable[..., Any], given: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A call whose result has the shape that `like` has."""
    node = graph.call_function(function, given)
    node.meta |= {key: like.meta[key] for key in ("shape", "batch", "tensor", "dtype", "line") if key in like.meta}
    return node


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


def _kept_channel(node: fx.Node, known: Known) -> Meant | None:
    """One channel by its number, with the dimension put back: unsqueeze(x[:, 2], 1)."""
    read = operands(node)[0] if calls(node, UNSQUEEZES) else None
    if read is None or not calls(read, (operator.getitem,)) or not isinstance(read.args[1], tuple):
        return None
    source, index = read.args[0], list(read.args[1])
    numbers = [i for i, part in enumerate(index) if isinstance(part, int)]
    if len(numbers) != 1 or numbers[0] == 0 or any(part is None or part is Ellipsis for part in index):
        return None
    (place,) = numbers
    if int(arg(node, 1, "dim")) % (1 + len(node.meta["shape"])) != place:
        return None
    index[place] = slice(index[place], index[place] + 1 or None)
    return operator.getitem, (source, tuple(index))


def _same_shape(node: fx.Node, known: Known) -> Meant | None:
    """A reshape that changes nothing, or that takes back a flatten: x.view(-1, 3, 32, 32)."""
    if not _keeps_order(node, known) or node.meta["batch"] != (1,):
        return None
    source, shape = operands(node)[0], node.meta["shape"]
    while source.meta["shape"] != shape and _keeps_order(source, known):
        source = operands(source)[0]
    same = source.meta["shape"] == shape and source.meta["batch"] == (1,)
    return (torch.clone, (source,)) if same else None


def _keeps_order(node: fx.Node, known: Known) -> bool:
    """Whether `node` is a reshape that keeps the images apart; so values stay in their order."""
    if calls(node, RESHAPES):
        return keeps_images(node, known)
    if calls(node, (*FLATTENS, *UNFLATTENS)):
        rank = 1 + len(operands(node)[0].meta["shape"])
        return int(arg(node, 1, "start_dim", arg(node, 1, "dim", 0))) % rank > 0
    return bool(node.meta.get("keeps_order"))


def mark_reshapes(traced: fx.GraphModule) -> None:
    """Set ``meta["keeps_order"]`` at calls of layers that reshape each image."""
    for node in traced.graph.nodes:
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (nn.Flatten, nn.Unflatten)):
            first = module.start_dim if isinstance(module, nn.Flatten) else module.dim
            node.meta["keeps_order"] = isinstance(first, int) and first > 0
