"""Replacing layers that private inference cannot run or that cost much: ReLU6 by ReLU, max pools by average pools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from shoal.errors import ShoalError
from shoal.surgery.normal_form import edit, own_module
from shoal.surgery.operations.pooling import MAX_OPTIONS
from shoal.surgery.sizes import arg

ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "relu6": (nn.ReLU6, F.relu6),
    "hardtanh": (nn.Hardtanh, F.hardtanh, F.hardtanh_),
    "silu": (nn.SiLU, F.silu),
    "gelu": (nn.GELU, F.gelu),
    "hardswish": (nn.Hardswish, F.hardswish),
    "mish": (nn.Mish, F.mish),
    "leaky_relu": (nn.LeakyReLU, F.leaky_relu, F.leaky_relu_),
    "prelu": (nn.PReLU, F.prelu, torch.prelu),
    "elu": (nn.ELU, F.elu, F.elu_),
    "celu": (nn.CELU, F.celu),
    "selu": (nn.SELU, F.selu),
    "softplus": (nn.Softplus, F.softplus),
    "tanh": (nn.Tanh, torch.tanh, F.tanh, "tanh", "tanh_"),
}
POOLS: dict[str, tuple[Any, ...]] = {"max_pool": (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d)}
GOALS = dict.fromkeys(ACTIVATIONS, "relu") | dict.fromkeys(POOLS, "avg_pool")
"""The replacement that each kind of layer has."""


def parse(choices: Iterable[str]) -> dict[str, str]:
    """Parse texts such as ``relu6=relu`` or ``relu6=relu,max_pool=avg_pool`` to ``{"relu6": "relu", ...}``.

    Raises ShoalError for a pair that is not in `GOALS`.
    """
    parts = [part.partition("=")[::2] for text in choices for part in text.split(",")]
    odd = [(old, new) for old, new in parts if GOALS.get(old) != new]
    if odd:
        known = ", ".join(f"{old}={new}" for old, new in GOALS.items())
        raise ShoalError(f"found {'='.join(odd[0])!r} to replace; need some of {known}")
    return dict(parts)


def substitute(model: nn.Module, choices: Mapping[str, str], shape: tuple[int, ...] | None = None) -> fx.GraphModule:
    """A copy of `model` with every layer of the kinds in `choices` (such as ``{"relu6": "relu"}``) replaced.

    The result needs training. Modules keep their names; function calls become modules named by their place. An average
    pool has the window, stride and (zero) padding of the max pool that it replaces. `shape` ([C, H, W]) is needed if
    forward decides something by the size of the images. Raises ShoalError for a pair that
    is not in `GOALS`, for a kind of layer that `model` does not have, and for a max pool with ceil_mode, dilation or
    indices.
    """
    wanted = parse(f"{old}={new}" for old, new in choices.items())
    missing = set(wanted)

    def change(traced: fx.GraphModule) -> None:
        used: set[str] = set()
        for node in list(traced.graph.nodes):
            kind = next((k for k in wanted if _is_a(traced, node, (ACTIVATIONS | POOLS)[k])), None)
            if kind is not None:
                missing.discard(kind)
                layer = nn.ReLU() if kind in ACTIVATIONS else _average(traced, node)
                own_module(traced, node, layer, wanted[kind], used)

    changed = edit(model, change, shape)
    if missing:
        raise ShoalError(f"found no {min(missing)} in the model to replace; need one of the kinds that it has")
    return changed


def _is_a(traced: fx.GraphModule, node: fx.Node, forms: tuple[Any, ...]) -> bool:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))) in forms
    return node.op in ("call_function", "call_method") and node.target in forms


def _average(traced: fx.GraphModule, node: fx.Node) -> nn.AvgPool2d:
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        found = {k: getattr(module, k) for k in MAX_OPTIONS}
    else:
        found = {k: arg(node, i, k) for i, k in enumerate(MAX_OPTIONS, start=1)}
    if found["return_indices"] or found["dilation"] not in (None, 1, (1, 1), [1, 1]):
        raise ShoalError(f"found a max pool with dilation or indices at {node.target}; need a plain one to replace")
    if found["ceil_mode"]:
        raise ShoalError(
            f"found a max pool with ceil_mode at {node.target}; need whole windows, since an average pool "
            "divides smaller windows at the edge by other counts; keep the max pool"
        )
    kernel, stride = found["kernel_size"], found["stride"] or found["kernel_size"]
    return nn.AvgPool2d(kernel, stride, found["padding"] or 0)
