"""Attention maps (section 5.2, Fig. 14). Masks are found in the traced graph, not by class name."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from shoal.surgery.sizes import operands
from shoal.surgery.tracing import shapes

PRODUCTS = (operator.mul, torch.mul, "mul")
SIGMOIDS = (torch.sigmoid, torch.nn.functional.sigmoid, "sigmoid")


def attention_nodes(traced: fx.GraphModule) -> dict[str, fx.Node]:
    """The attention masks in a graph with shapes, by submodule or node name.

    A mask is a factor of a product and a sigmoid's result with more than one position. Channel attention, which has one
    value per channel, is not included.
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
    """Every attention mask, averaged over channels, float32 [N, H, W]; empty if the network has none.

    `images` are normalised, float32 [N, C, H, W].
    """
    traced = shapes(model, tuple(images.shape[1:]))
    masks = attention_nodes(traced)
    if not masks:
        return {}
    next(n for n in traced.graph.nodes if n.op == "output").args = (tuple(masks.values()),)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return {name: mask.mean(1) for name, mask in zip(masks, traced(images), strict=True)}
