"""Simplifying a graph: folding batch norms, removing ReLUs without kept positions, merging convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.graph import Graph
from shoal.graph.linear_tail import merge_linear_tail
from shoal.graph.ops import Node


def fold(graph: Graph) -> Graph:
    """A graph that computes the same (to 1e-4 in float32) in fewer and simpler operations. Idempotent.

    Folds batch norms and constant factors into the neighbouring layers, or turns them into 1x1 depthwise convolutions
    if there is no such layer. Removes ReLUs whose mask keeps no position. Merges two successive convolutions where that
    is exact and does not increase the MACs. Replaces the layers after the last ReLU by one linear layer where that has
    fewer MACs.
    """
    if not isinstance(graph, Graph):
        raise ShoalError(
            f"found a {type(graph).__name__} to fold; need a shoal.Graph; use shoal.trace(model, shape), which makes it"
        )
    for step in (fold_batchnorm, drop_dead_relus, _merge_where_cheaper, merge_linear_tail):
        graph = step(graph)
    return graph


def _rewire(graph: Graph, gone: dict[str, str], changed: dict[str, Node], weights: dict[str, Tensor]) -> Graph:
    """Remove the nodes in `gone`, whose readers then read the node that it maps to, and replace those in `changed`."""

    def final(name: str) -> str:
        while name in gone:
            name = gone[name]
        return name

    nodes = [changed.get(n.name, n) for n in graph.nodes if n.name not in gone]
    nodes = [replace(n, inputs=tuple(final(i) for i in n.inputs)) for n in nodes]
    outputs = tuple(final(name) for name in graph.outputs)
    return replace(graph, outputs=outputs).with_nodes(nodes, weights)


def fold_batchnorm(graph: Graph) -> Graph:
    """Fold each batch norm and each affine node into a neighbouring layer.

    It is folded into the convolution or linear layer before it, if nothing else reads that layer. Otherwise a node on
    [C, H, W] becomes a 1x1 depthwise convolution, and a node on flat features is folded into the linear layers that
    read it, or stays if other operations read it too.
    """
    folding = _Folding(graph)
    for node in graph.nodes:
        if node.op in ("batch_norm", "affine"):
            folding.fold(node)
    for node in reversed(folding.flat):  # the last first, so that each one's readers are linear layers
        folding.fold_into_readers(node)
    return _rewire(graph, folding.gone, folding.changed, folding.weights)


class _Folding:
    """The state while the batch norms of a graph are folded one after the other."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.users = graph, graph.users()
        self.gone: dict[str, str] = {}
        self.changed: dict[str, Node] = {}
        self.weights = dict(graph.weights)
        self.flat: list[Node] = []

    def fold(self, node: Node) -> None:
        """Fold one node; a later node may be folded into the result. What only readers can take in goes to `flat`."""
        scale, shift = affine(node, self.graph.parameters(node))
        before = node.inputs[0]
        layer = self._layer(before)
        alone = len(self.users[before]) == 1 and before not in self.graph.outputs
        if layer.op in ("conv2d", "linear") and alone:
            _into_layer(self.weights, layer.name, scale, shift)
            self.gone[node.name] = layer.name
        elif len(node.shape) == 3:
            self.changed[node.name] = _as_conv(self.weights, node, scale, shift)
        else:
            self.flat.append(node)

    def fold_into_readers(self, node: Node) -> None:
        """Fold a node on flat features into the linear layers that read it, if nothing else does."""
        readers = self._readers(node.name)
        if node.name not in self.graph.outputs and all(n.op == "linear" for n in readers):
            scale, shift = affine(node, self.graph.parameters(node))
            for reader in readers:
                _into_reader(self.weights, reader.name, scale, shift)
            self.gone[node.name] = node.inputs[0]

    def _readers(self, name: str) -> list[Node]:
        found = [[n] if n.name not in self.gone else self._readers(n.name) for n in self.users[name]]
        return [n for nodes in found for n in nodes]

    def _layer(self, name: str) -> Node:
        while name in self.gone:
            name = self.gone[name]
        return self.changed.get(name, self.graph[name])


def affine(node: Node, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and shift, each float64 [C], of a batch norm in eval mode or of an affine node with parameters `p`."""
    one = torch.ones(node.shape[0], dtype=torch.float64, device=next(iter(p.values())).device)
    if node.op == "affine":
        flat = {k: v.double().reshape(-1) for k, v in p.items()}
        scale = one * flat.get("scale", one) * flat.get("weight", one)
        # An affine node applies scale, weight, shift and bias in this order.
        return scale, 0 * one + flat.get("shift", 0 * one) + flat.get("bias", 0 * one)
    var, mean = p["var"].double(), p["mean"].double()
    scale = (var + node.attrs["eps"]).rsqrt() * p.get("weight", one).double()
    return scale, p.get("bias", 0 * one).double() - mean * scale


def _into_layer(weights: dict[str, Tensor], layer: str, scale: Tensor, shift: Tensor) -> None:
    weight = weights[f"{layer}.weight"]
    bias = weights.get(f"{layer}.bias")
    moved = shift if bias is None else bias.double() * scale + shift
    weights[f"{layer}.weight"] = (weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    weights[f"{layer}.bias"] = moved.to(weight.dtype)


def _into_reader(weights: dict[str, Tensor], linear: str, scale: Tensor, shift: Tensor) -> None:
    weight = weights[f"{linear}.weight"].double()
    bias = weights.get(f"{linear}.bias", weight.new_zeros(len(weight))).double()
    dtype = weights[f"{linear}.weight"].dtype
    weights[f"{linear}.weight"] = (weight * scale).to(dtype)
    weights[f"{linear}.bias"] = (bias + weight @ shift).to(dtype)


def _as_conv(weights: dict[str, Tensor], node: Node, scale: Tensor, shift: Tensor) -> Node:
    for name in ("weight", "bias", "mean", "var", "scale", "shift"):
        weights.pop(f"{node.name}.{name}", None)
    weights[f"{node.name}.weight"] = scale.float()[:, None, None, None]
    weights[f"{node.name}.bias"] = shift.float()
    attrs = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": len(scale)}
    return replace(node, op="conv2d", attrs=attrs)


def drop_dead_relus(graph: Graph) -> Graph:
    """Remove ReLUs whose mask keeps no position, and masks that keep every position."""
    gone: dict[str, str] = {}
    weights = dict(graph.weights)
    for node in graph.nodes:
        mask = graph.weights.get(f"{node.name}.mask")
        if node.op != "relu" or mask is None:
            continue
        if not bool(mask.any()):
            gone[node.name] = node.inputs[0]
        elif bool(mask.all()):
            weights.pop(f"{node.name}.mask")
    return _rewire(graph, gone, {}, weights)


def merge_convs(graph: Graph, first: str, second: str, *, allow_border_error: bool = False) -> Graph:
    """Replace the convolution `first` and its only reader, the convolution `second`, by one that computes the same.

    Exact only if `second` has no zero padding: one kernel cannot reproduce the zeros that `second` pads the result of
    `first` with, since `first` would give other values there. Strides are handled by dilating the second kernel. Raises
    ShoalError when the two nodes are not two such plain convolutions, and when the merge is not exact. With
    `allow_border_error` an inexact merge is accepted; results then differ near the borders.
    """
    a, b = graph[first], graph[second]
    _check_mergeable(graph, a, b)
    if b.attrs["padding"] != [0, 0] and not allow_border_error:
        raise ShoalError(
            f"found zero padding {b.attrs['padding']} between {first} and {second}; need none for an exact merge; "
            "train one shallow convolution instead (add_branches) or pass allow_border_error=True"
        )
    node, merged = _merged(graph, a, b)
    weights = {k: v for k, v in graph.weights.items() if k.rpartition(".")[0] not in (first, second)} | merged
    return _rewire(graph, {first: a.inputs[0]}, {second: node}, weights)


def _check_mergeable(graph: Graph, a: Node, b: Node) -> None:
    plain = all(n.op == "conv2d" and n.attrs["groups"] == 1 and n.attrs["dilation"] == [1, 1] for n in (a, b))
    if not plain or b.inputs != (a.name,) or len(graph.users()[a.name]) != 1 or a.name in graph.outputs:
        raise ShoalError(
            f"found {a.name} and {b.name} not mergeable; need two convolutions without groups or dilation, the second "
            "the only reader of the first; leave them as they are"
        )


def _merged(graph: Graph, a: Node, b: Node) -> tuple[Node, dict[str, Tensor]]:
    p, q = graph.parameters(a), graph.parameters(b)
    stride = a.attrs["stride"]
    # The composition of two cross-correlations has as its kernel the full convolution of the two kernels, the second
    # dilated by the stride of the first.
    dilated = _dilate(q["weight"].double(), stride)
    kernel = _compose(p["weight"].double(), dilated)
    bias = (
        q["weight"].double().sum((2, 3)) @ p["bias"].double()
        if "bias" in p
        else q["weight"].new_zeros(len(q["weight"])).double()
    )
    bias = bias + q.get("bias", bias.new_zeros(len(bias))).double()
    attrs = {
        "stride": [s * t for s, t in zip(stride, b.attrs["stride"], strict=True)],
        "padding": [u + s * v for u, s, v in zip(a.attrs["padding"], stride, b.attrs["padding"], strict=True)],
        "dilation": [1, 1],
        "groups": 1,
    }
    dtype = p["weight"].dtype
    weights = {f"{b.name}.weight": kernel.to(dtype), f"{b.name}.bias": bias.to(dtype)}
    return replace(b, attrs=attrs, inputs=(a.name,)), weights


def _dilate(kernel: Tensor, stride: list[int]) -> Tensor:
    o, i, h, w = kernel.shape
    wide = kernel.new_zeros(o, i, (h - 1) * stride[0] + 1, (w - 1) * stride[1] + 1)
    wide[:, :, :: stride[0], :: stride[1]] = kernel
    return wide


def _compose(first: Tensor, second: Tensor) -> Tensor:
    h, w = second.shape[-2:]
    swapped = first.transpose(0, 1)
    return F.conv2d(swapped, second.flip(2, 3), padding=(h - 1, w - 1)).transpose(0, 1)


def _merge_where_cheaper(graph: Graph) -> Graph:
    for node in graph.nodes:
        source = graph[node.inputs[0]] if node.inputs else None
        if node.op != "conv2d" or source is None or source.op != "conv2d":
            continue
        merged = _attempt(lambda a=source.name, b=node.name: merge_convs(graph, a, b))  # type: ignore[misc]
        if merged is not None and cost(merged).macs <= cost(graph).macs:
            return _merge_where_cheaper(merged)
    return graph


def _attempt(merge: Callable[[], Graph]) -> Graph | None:
    try:
        return merge()
    except ShoalError:
        return None  # no exact merge is possible here, so both convolutions stay
