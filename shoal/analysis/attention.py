"""Attention maps (section 5.2, Fig. 14): masks found in the traced graph, never by class name."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from shoal.surgery.sizes import operands
from shoal.surgery.tracing import shapes

PRODUCTS = (operator.mul, torch.mul, "mul")
SIGMOIDS = (torch.sigmoid, torch.nn.functional.sigmoid, "sigmoid")


def attention_nodes(traced: fx.GraphModule) -> dict[str, fx.Node]:
    """The masks of a graph with shapes: sigmoids over a map that are a factor of a product, by submodule or node name.

    Channel attention, whose masks have one value a channel, is none.
    """
    found = {}
    for node in traced.graph.nodes:
        for factor in operands(node) if node.target in PRODUCTS else ():
            shape = factor.meta["shape"]
            if _is_sigmoid(traced, factor) and len(shape) == 3 and shape[1] * shape[2] > 1:
                found[str(factor.target) if factor.op == "call_module" else factor.name] = factor
    return found


def _is_sigmoid(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(traced.get_submodule(str(node.target)), nn.Sigmoid)
    return node.op != "placeholder" and node.target in SIGMOIDS


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The mean over channels [N, H, W] of every attention mask, for normalised `images` [N, C, H, W]; maybe none."""
    traced = shapes(model, tuple(images.shape[1:]))
    masks = attention_nodes(traced)
    if not masks:
        return {}
    next(n for n in traced.graph.nodes if n.op == "output").args = (tuple(masks.values()),)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return {name: mask.mean(1) for name, mask in zip(masks, traced(images), strict=True)}
