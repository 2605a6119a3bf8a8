"""Sizes in a forward pass: recording shapes, `len(x)`, views, and flattening written as a reshape.

A `Graph` has a fixed image size and any number of images, so every size except the number of images is a constant.
"""

from __future__ import annotations

import contextlib
import math
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

RESHAPES = ("reshape", torch.reshape)

BATCH = math.nan
"""Placeholder for the number of images when sizes are computed; arithmetic with NaN never gives a number."""


def operands(node: fx.Node) -> list[fx.Node]:
    """Every node among the arguments, in order, repeated as often as it occurs (`all_input_nodes` drops repeats)."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def calls(node: fx.Node, targets: Iterable[Any]) -> bool:
    """Whether `node` calls one of the functions, or of the methods named, in `targets`.

    A submodule or buffer may have the name of a method, such as `mean`.
    """
    return node.op in ("call_function", "call_method") and node.target in targets


def arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, passed by position or by name; `default` if it is not passed."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


class Shapes(fx.Interpreter):
    """An interpreter that records the shape of every node's result in the node's `meta`.

    ``meta["shape"]`` is the shape without the batch dimension, ``meta["batch"]`` the batch dimension as a 1-tuple. For
    a result that is not one tensor both are (). For a tuple of tensors ``meta["parts"]`` lists their shapes without
    the batch. ``meta["tensor"]`` is true if the result is or contains a tensor; ``meta["dtype"]`` is its type.
    """

    current: fx.Node | None = None
    """The node that runs, or ran last; the one to name when it fails."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, record its shape, and return its value."""
        self.current = n
        result = super().run_node(n)
        shape = tuple(result.shape) if isinstance(result, Tensor) else ()
        n.meta["dtype"] = result.dtype if isinstance(result, Tensor) else None
        n.meta |= {"shape": shape[1:], "batch": shape[:1], "tensor": _holds_tensor(result)}
        if isinstance(result, (tuple, list)) and all(isinstance(part, Tensor) for part in result):
            n.meta["parts"] = [tuple(part.shape[1:]) for part in result]
        return result


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))


def is_tensor(node: fx.Node) -> bool:
    """Whether the result of `node` is or contains a tensor, as recorded by `Shapes`; false for a size."""
    return bool(node.meta.get("tensor"))


@contextlib.contextmanager
def recorded_builtins(model: nn.Module) -> Iterator[None]:
    """While tracing, make `len` and `isinstance` in the modules' own source files fit traced values.

    `len(x)` means `x.size(0)`, since Python requires an int from `len`, which a traced value cannot give. A traced
    tensor is a `torch.Tensor`.
    """
    users = {type(m).__module__ for m in model.modules() if not type(m).__module__.startswith("torch.")}
    spaces = [vars(sys.modules[name]) for name in users if name in sys.modules]
    own = {"len": _length, "isinstance": _is_instance}
    changed = [(space, name) for space in spaces for name in own if name not in space]
    torch.is_tensor, before = (lambda obj: _is_instance(obj, Tensor)), torch.is_tensor  # type: ignore[assignment]
    try:
        for space, name in changed:
            space[name] = own[name]
        yield
    finally:
        torch.is_tensor = before
        for space, name in changed:
            space.pop(name, None)


def _length(value: Any) -> Any:
    if not isinstance(value, fx.Proxy):
        return len(value)
    found = _measured(value)
    return len(found) if isinstance(found, (tuple, list)) else value.size(0)


def _is_instance(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) or (isinstance(value, fx.Proxy) and isinstance(_measured(value), kind))


def _measured(value: fx.Proxy) -> Any:
    tracer: Any = value.tracer
    return tracer.measured(value.node)


def relax_view(node: fx.Node) -> None:
    """Turn a view into a reshape, in place, since `x.view(N, -1)` fails in channels_last, which training uses."""
    given = (*node.args, *node.kwargs.values())
    if node.op == "call_method" and node.target == "view" and not any(isinstance(a, torch.dtype) for a in given):
        node.target, node.args, node.kwargs = "reshape", given, {}


def fix_sizes(traced: fx.GraphModule) -> dict[fx.Node, Any]:
    """Replace sizes in arguments by numbers, and a reshape that only flattens by a flatten, in place.

    Needs the shapes that `Shapes` recorded for one image; afterwards the module is valid for that image size only.
    Returns the known sizes by node, for `keeps_images`.
    """
    known = _known_sizes(traced)
    fixed = {n: v for n, v in known.items() if all(isinstance(i, int) for i in (v if isinstance(v, tuple) else (v,)))}
    for node in traced.graph.nodes:
        if calls(node, RESHAPES) and len(node.meta["shape"]) == 1 and keeps_images(node, known):
            node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (operands(node)[0], 1), {}
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: fixed.get(n, n))
    return known


ARITHMETIC = (
    *(operator.getitem, operator.mul, operator.add, operator.sub, operator.floordiv, operator.truediv, operator.mod),
    *(operator.neg, operator.pow, min, max, math.ceil, math.floor, math.prod, math.sqrt, getattr),
)
"""Calls that compute sizes from sizes."""


def _known_sizes(traced: fx.GraphModule) -> dict[fx.Node, Any]:
    """Values of the nodes that compute with sizes: ints or tuples of ints, with `BATCH` for the number of images."""
    one, two = (_sizes_for(traced, batch) for batch in (1, 2))
    return {node: _joined(one[node], two[node]) for node in one if node in two}


def _joined(one: Any, two: Any) -> Any:
    """A size from its values for one and for two images: `BATCH` for their number, another NaN for what depends on it.

    >>> _joined((1, 64), (2, 64))
    (nan, 64)
    """
    if isinstance(one, tuple) and isinstance(two, tuple):
        return tuple(_joined(a, b) for a, b in zip(one, two, strict=False))
    return one if one == two else BATCH if (one, two) == (1, 2) else float("nan")


def _sizes_for(traced: fx.GraphModule, batch: int) -> dict[fx.Node, Any]:
    """Values of the nodes that compute with sizes, for `batch` images."""
    known: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        sources = operands(node)
        if node.op == "call_method" and node.target == "size":
            dim = arg(node, 1, "dim")
            known[node] = _dimensions(sources[0], batch) if dim is None else _dimensions(sources[0], batch)[dim]
        elif calls(node, ("numel", "nelement")) and is_tensor(sources[0]):
            known[node] = math.prod(_dimensions(sources[0], batch))
        elif calls(node, (getattr,)) and node.args[1] == "shape":
            known[node] = _dimensions(sources[0], batch)
        elif sources and all(n in known for n in sources):
            args = fx.map_arg(node.args, known.__getitem__)
            with contextlib.suppress(ArithmeticError, TypeError, ValueError):
                if calls(node, ("numel",)):
                    known[node] = math.prod(args[0])
                elif calls(node, ARITHMETIC):
                    known[node] = node.target(*args)
    return known


def _dimensions(node: fx.Node, batch: float = BATCH) -> tuple[Any, ...]:
    # The shapes were recorded for one image, so a first dimension other than 1 is not the batch dimension.
    return (batch if node.meta["batch"] == (1,) else float("nan"), *node.meta["shape"])


def keeps_images(node: fx.Node, known: Mapping[fx.Node, Any]) -> bool:
    """Whether a reshape keeps the batch dimension, however its target shape is written."""
    first, *rest = _dimensions(operands(node)[0])
    sizes: Any = fx.map_arg((*node.args, *node.kwargs.values())[1:], lambda n: known.get(n, n))
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    if first is not BATCH or len(sizes) < 2 or not all(isinstance(s, int) for s in sizes[1:]):
        return False
    return sizes[0] is BATCH or (sizes[0] == -1 and math.prod(sizes[1:]) == math.prod(rest))
