"""Convolutions and linear layers that forward calls as functions, with weights that depend on no image."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from shoal.graph.graph import Lowered, unknown
from shoal.surgery.operations.pooling import pair
from shoal.surgery.sizes import arg, calls, operands

CONVOLUTIONS = (F.conv2d, torch.conv2d)
PRODUCTS = (torch.matmul, operator.matmul, torch.mm, "matmul", "mm")
LAYERS = (*CONVOLUTIONS, F.linear, *PRODUCTS, torch.addmm)
CONV_OPTIONS = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
"""Options of a functional convolution in the order of its arguments, after the bias, with their defaults."""


def lower_functional(traced: fx.GraphModule, node: fx.Node) -> Lowered:
    """Convert a call in `LAYERS`; it is unknown unless its weights are attributes of the model or constants."""
    if calls(node, CONVOLUTIONS):
        return _convolution(traced, node)
    if calls(node, (torch.addmm,)):
        bias, value, weight = (arg(node, i, k) for i, k in enumerate(("input", "mat1", "mat2")))
        return _linear(traced, node, value, weight, bias, turned=True)
    if calls(node, PRODUCTS):
        return _linear(traced, node, arg(node, 0, "input"), arg(node, 1, "other"), None, turned=True)
    return _linear(traced, node, *(arg(node, i, k) for i, k in enumerate(("input", "weight", "bias"))))


def is_weight(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether every reader of the model attribute `node` is a layer that has it as its weight or bias."""
    readers = [u for u in node.users if calls(u, LAYERS)]
    return len(readers) == len(node.users) > 0 and all(lower_functional(traced, u)[0] != "unknown" for u in readers)


def _convolution(traced: fx.GraphModule, node: fx.Node) -> Lowered:
    weight, bias = (_held(traced, arg(node, i, k)) for i, k in ((1, "weight"), (2, "bias")))
    value = arg(node, 0, "input")
    options = {name: arg(node, i, name, usual) for i, (name, usual) in enumerate(CONV_OPTIONS, start=3)}
    if weight is None or (bias is None and arg(node, 2, "bias") is not None) or len(value.meta["shape"]) != 3:
        return unknown("conv2d with weights that depend on the image")
    if isinstance(options["padding"], str):
        zeros = [d * (k - 1) for d, k in zip(pair(options["dilation"]), weight.shape[2:], strict=True)]
        if options["padding"] == "same" and any(z % 2 for z in zeros):
            return unknown("conv2d with padding='same' and an even kernel, which pads one side more")
        options["padding"] = [z // 2 if options["padding"] == "same" else 0 for z in zeros]
    attrs = {name: pair(options[name]) for name in ("stride", "padding", "dilation")}
    return "conv2d", attrs | {"groups": int(options["groups"])}, _present(weight, bias)


def _linear(
    traced: fx.GraphModule, node: fx.Node, value: Any, weight: Any, bias: Any, *, turned: bool = False
) -> Lowered:
    """A linear layer of flat features; `turned` if its weight is [in, out], as matrix products have it."""
    own, shift = _held(traced, weight), _held(traced, bias)
    flat = isinstance(value, fx.Node) and value.op != "get_attr" and len(value.meta["shape"]) == 1
    if not flat or own is None or own.dim() != 2 or (shift is None and bias is not None):
        name = str(getattr(node.target, "__name__", node.target))
        both = len([n for n in operands(node) if n.op != "get_attr"]) > 1
        return unknown(f"{name} of two values" if both else f"{name} of other than flat features and a weight")
    if shift is not None and shift.shape != (own.shape[1 if turned else 0],):
        return unknown("linear with a bias of another shape")
    return "linear", {}, _present(own.t() if turned else own, shift)


def _held(traced: fx.GraphModule, value: Any) -> Tensor | None:
    """The tensor that `value` reads from the model, or None."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found = operator.attrgetter(str(value.target))(traced)
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def _present(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {"weight": weight} | ({} if bias is None else {"bias": bias})
