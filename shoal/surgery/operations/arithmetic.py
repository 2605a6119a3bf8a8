"""Addition, subtraction, multiplication and division in a forward pass, converted to `Graph` operations."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from shoal.graph.graph import Lowered, unknown

ARITHMETIC: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), "sub"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"), "mul"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), "div"),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), "neg"),
}
"""The kind of arithmetic that each call target performs."""


def lower_arithmetic(traced: fx.GraphModule, node: fx.Node) -> Lowered:
    """Convert an arithmetic node whose target is in `ARITHMETIC`.

    Supported are the sum and the difference of two values of the same shape, and one value combined with a constant (a
    number, or a tensor with one entry or one entry per channel). A constant that is a parameter becomes ``weight`` or
    ``bias``; a number or buffer becomes ``scale`` or ``shift``. Everything else becomes ``unknown``.
    """
    kind = ARITHMETIC[node.target]
    if kind == "neg":
        return "affine", {}, {"scale": torch.tensor(-1.0)}
    if len(node.args) != 2 or node.kwargs:
        return unknown(f"options of {kind}")
    values = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    if len(values) == 2:
        shapes = [v.meta["shape"] for v in values]
        if kind in ("mul", "div") or shapes[0] != shapes[1]:
            return unknown(f"{kind} of values of shapes {shapes[0]} and {shapes[1]}")
        return kind, {}, {}
    found = _with_constant(traced, node, kind) if values else None
    return found or unknown(f"{kind} with something other than a number or one number per channel")


def _with_constant(traced: fx.GraphModule, node: fx.Node, kind: str) -> Lowered | None:
    reverse = not isinstance(node.args[0], fx.Node) or node.args[0].op == "get_attr"
    other, value = node.args if reverse else node.args[::-1]
    assert isinstance(value, fx.Node)
    constant = _constant(traced, other, value.meta["shape"])
    if constant is None or (kind == "div" and reverse):
        return None
    if isinstance(constant, nn.Parameter):
        held: dict[str, dict[str, Tensor]] = {
            "add": {"bias": constant},
            "mul": {"weight": constant},
            "div": {"weight": 1 / constant},
            "sub": {"scale": torch.tensor(-1.0), "bias": constant} if reverse else {"bias": -constant},
        }
        return "affine", {}, held[kind]
    if (kind == "add" or (kind == "sub" and not reverse)) and not constant.any():
        return "identity", {}, {}  # Python's sum starts with 0
    return "affine", {}, _affine(kind, constant, reverse)


def _affine(kind: str, constant: Tensor, reverse: bool) -> dict[str, Tensor]:
    if kind == "mul":
        return {"scale": constant}
    if kind == "div":
        return {"scale": 1 / constant}
    shift = {"shift": constant if kind == "add" or reverse else -constant}
    return shift | ({"scale": torch.tensor(-1.0)} if kind == "sub" and reverse else {})


def _constant(traced: fx.GraphModule, argument: Any, shape: tuple[int, ...]) -> Tensor | None:
    """`argument` as a tensor if it is a number, or a model attribute with one entry or one per channel; else None."""
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        return torch.tensor(float(argument))
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    value = operator.attrgetter(str(argument.target))(traced)
    per_channel = (shape[0], *[1] * (len(shape) - 1))
    fits = (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and (value.numel() == 1 or tuple(value.shape) in (per_channel, (1, *per_channel)))
    )
    return value if fits else None


def is_absorbed(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether every reader of the model attribute `node` is arithmetic that becomes an affine (or no) operation.

    Such an attribute is stored in the affine node and needs no node of its own.
    """
    readers = [u for u in node.users if u.target in ARITHMETIC and u.op in ("call_function", "call_method")]
    return len(readers) == len(node.users) > 0 and all(
        lower_arithmetic(traced, u)[0] in ("affine", "identity") for u in readers
    )
