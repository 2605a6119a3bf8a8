"""Values in a forward pass that depend on no image: they are computed once, when a `Graph` is made.

Standardised and quantised weights, views of a parameter, and devices and types of tensors are such values.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from shoal.surgery.sizes import operands

CASTS = ("float", "double", "half", "to", "type", "type_as", "cpu", "cuda")
"""Methods that change the type or the device of a tensor."""


def settle_constants(traced: fx.GraphModule) -> None:
    """Compute all calls whose arguments are parameters and buffers, and leave out casts that change nothing, in place.

    The results become buffers of `traced`. Needs the types and shapes that `sizes.Shapes` records.
    """
    graph = traced.graph
    for node in list(graph.nodes):
        if _casts_nothing(node):
            node.replace_all_uses_with(operands(node)[0])
            _erase(graph, node)
        elif _is_constant(node):
            _settle(traced, node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _casts_nothing(node: fx.Node) -> bool:
    if node.op != "call_method" or node.target not in CASTS or not operands(node):
        return False
    return node.meta["dtype"] is not None and operands(node)[0].meta["dtype"] == node.meta["dtype"]


def _is_constant(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    in_place = name.endswith("_") and not name.endswith("__")
    sources = operands(node)
    return (
        node.op in ("call_function", "call_method")
        and not in_place
        and bool(sources)
        and all(source.op == "get_attr" for source in sources)
    )


def _settle(traced: fx.GraphModule, node: fx.Node) -> None:
    held = {n: operator.attrgetter(str(n.target))(traced) for n in operands(node)}
    args, kwargs = fx.map_arg((node.args, node.kwargs), held.__getitem__)
    target: Any = node.target
    with torch.no_grad():
        value = target(*args, **kwargs) if node.op == "call_function" else getattr(args[0], target)(*args[1:], **kwargs)
    if isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
        return  # its parts are computed when they are read, or stay unknown
    if not isinstance(value, Tensor):
        for user in list(node.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: value if n is node else n)
        _erase(traced.graph, node)
        return
    parameters = [v for v in held.values() if isinstance(v, nn.Parameter)]
    # A view of a parameter is still a parameter where parameters are counted.
    kept = len(parameters) == len(held) == 1 and parameters[0].numel() == value.numel()
    name = next(n for i in range(len(traced.graph.nodes)) if not hasattr(traced, n := f"constant_{i}"))
    setattr(traced, name, nn.Parameter(value.detach(), requires_grad=False)) if kept else traced.register_buffer(
        name, value.detach()
    )
    node.op, node.target, node.args, node.kwargs = "get_attr", name, (), {}


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase an unread `node`, and what only it read that computes a size, device or type."""
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if not source.users and not source.meta.get("tensor") and source.op == "call_function":
            _erase(graph, source)


CREATORS = (torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace, torch.eye)
NEW = {"new_tensor": torch.tensor, "new_zeros": torch.zeros, "new_ones": torch.ones, "new_full": torch.full}
"""Methods of a tensor that make another one of its type and device."""


def settle_created(root: nn.Module, graph: fx.Graph) -> None:
    """Make tensors that forward makes from numbers buffers of `root`, in place.

    They may ask for the device and the type of an image's features: buffers are moved with the network.
    """
    for node in list(graph.nodes):
        method = node.op == "call_method" and node.target in NEW
        if not method and not (node.op == "call_function" and node.target in CREATORS):
            continue
        asked = operands(node)[1:] if method else operands(node)
        if (not asked and not method) or not all(_asks_for_place(source) for source in asked):
            continue
        given = [a for a in node.args[1 if method else 0 :] if not isinstance(a, fx.Node)]
        options: dict[str, Any] = {k: v for k, v in node.kwargs.items() if not isinstance(v, fx.Node)}
        if method or "dtype" in node.kwargs:
            options = {"dtype": torch.float32} | options
        name = next(n for i in range(len(graph.nodes)) if not hasattr(root, n := f"created_{i}"))
        create: Any = NEW[str(node.target)] if method else node.target
        root.register_buffer(name, create(*given, **options))
        sources = node.all_input_nodes
        node.op, node.target, node.args, node.kwargs = "get_attr", name, (), {}
        for source in sources:
            if not source.users and _asks_for_place(source):
                graph.erase_node(source)


def _asks_for_place(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("device", "dtype")
