"""The operations of a `Graph`: its nodes, and what each operation computes in floating point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import ShoalError
from shoal.graph.index import check_index


@dataclass(frozen=True)
class Node:
    """One operation of a `Graph`. `inputs` are names of nodes; `shape` is the result's, without the batch dimension."""

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    attrs: dict[str, Any] = field(default_factory=dict)


def masked_relu(x: Tensor, mask: Tensor | None) -> Tensor:
    """ReLU of x [N, C, H, W] where `mask` (bool [C, H, W]) is true, the identity elsewhere; plain ReLU without mask."""
    return torch.relu(x) if mask is None else torch.where(mask, torch.relu(x), x)


def quadratic_relu(x: Tensor, mask: Tensor, square: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """ReLU of x [N, C, H, W] where `mask` (bool [C, H, W]) is true, elsewhere square x^2 + slope x + offset.

    The coefficients `square`, `slope` and `offset` are [C].
    """
    a, b, c = (v.reshape(-1, *(1,) * (mask.dim() - 1)) for v in (square, slope, offset))
    return torch.where(mask, torch.relu(x), (a * x + b) * x + c)


def _batch_norm(p: dict[str, Tensor], a: dict[str, Any], x: Tensor) -> Tensor:
    return F.batch_norm(x, p["mean"], p["var"], p.get("weight"), p.get("bias"), False, 0.0, a["eps"])


def _conv2d(p: dict[str, Tensor], a: dict[str, Any], x: Tensor) -> Tensor:
    return F.conv2d(x, p["weight"], p.get("bias"), a["stride"], a["padding"], a["dilation"], a["groups"])


def _max_pool2d(p: dict[str, Tensor], a: dict[str, Any], x: Tensor) -> Tensor:
    more = a.get("padding", 0), a.get("dilation", 1), a.get("ceil_mode", False)
    return F.max_pool2d(x, a["kernel"], a["stride"], *more)


def _affine(p: dict[str, Tensor], a: dict[str, Any], x: Tensor) -> Tensor:
    for name, combine in (("scale", torch.mul), ("weight", torch.mul), ("shift", torch.add), ("bias", torch.add)):
        if name in p:
            x = combine(x, p[name].reshape(-1, *[1] * (x.dim() - 2)))
    return x


def _take(p: dict[str, Tensor], a: dict[str, Any], x: Tensor) -> Tensor:
    check_index(a["index"], tuple(x.shape[1:]))
    for dim, index in enumerate(a["index"], start=1):
        if index is not None:
            x = x.index_select(dim, torch.tensor(index, device=x.device))
    return x


OPS: dict[str, Callable[..., Tensor]] = {
    "conv2d": _conv2d,
    "batch_norm": _batch_norm,
    "linear": lambda p, a, x: F.linear(x, p["weight"], p.get("bias")),
    "relu": lambda p, a, x: masked_relu(x, p.get("mask")),
    "quadratic": lambda p, a, x: quadratic_relu(x, p["mask"], p["square"], p["slope"], p["offset"]),
    "relu6": lambda p, a, x: F.relu6(x),
    "add": lambda p, a, x, y: x + y,
    "sub": lambda p, a, x, y: x - y,
    "affine": _affine,
    "avg_pool2d": lambda p, a, x: F.avg_pool2d(x, a["kernel"], a["stride"]),
    "max_pool2d": _max_pool2d,
    "mean": lambda p, a, x: x.mean((2, 3), keepdim=a["keepdim"]),
    "flatten": lambda p, a, x: x.flatten(1),
    "concat": lambda p, a, *xs: torch.cat(xs, 1),
    "subsample": lambda p, a, x: x[:, :, :: a["stride"][0], :: a["stride"][1]],
    "take": _take,
    "pad": lambda p, a, x: F.pad(x, a["pads"]),
}
"""The function of each operation: (parameters, attributes, *inputs) -> value."""


def evaluate(node: Node, parameters: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """The value of one node [N, ...] from its parameters and inputs, in floating point.

    Raises ShoalError for an operation that is not in `OPS`.
    """
    if node.op not in OPS:
        raise ShoalError(
            f"found operation {node.attrs.get('target', node.op)!r} at {node.name}; need one of {', '.join(OPS)}; "
            "rewrite that part of the model with them"
        )
    return OPS[node.op](parameters, node.attrs, *inputs)
