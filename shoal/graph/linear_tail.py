"""Merging the linear tail of a network (all layers after the last ReLU) into one linear layer; exact for any padding.

Removing the ReLUs of the last stage leaves convolutions, an average pool and a linear layer without a ReLU between
them. Together they are one matrix from the last ReLU's values to the logits, often with far fewer multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from shoal.graph.counting import cost
from shoal.graph.graph import Graph
from shoal.graph.ops import Node, evaluate

LINEAR = (
    "conv2d", "batch_norm", "affine", "linear", "add", "sub", "avg_pool2d", "mean", "flatten", "concat", "subsample",
    "take", "pad",
)  # fmt: skip
"""Operations whose result is an affine function of their inputs."""

ROWS = 32
"""Number of rows of the matrix that are computed at once, which limits memory."""


def merge_linear_tail(graph: Graph) -> Graph:
    """A graph that computes the same, with the linear tail as one linear layer if that has fewer multiply-adds.

    The tail begins where this saves most. Returns `graph` itself if nothing is saved or if it has several exits.
    """
    best = max((node for node in graph.nodes), key=lambda node: _saving(graph, node))
    if _saving(graph, best) <= 0:
        return graph
    return _replaced(graph, best, _tail(graph, best))


def _tail(graph: Graph, source: Node) -> list[Node]:
    """The nodes after `source` up to the logits; empty unless the logits are an affine function of `source` alone."""
    if len(graph.outputs) != 1 or graph.outputs[0] == source.name or len(graph[graph.outputs[0]].shape) != 1:
        return []
    wanted, tail = {graph.outputs[0]}, list[Node]()
    for node in reversed(graph.nodes):
        if node.name not in wanted or node is source:
            continue
        if node.op not in LINEAR:
            return []
        tail.insert(0, node)
        wanted.update(node.inputs)
    return tail if source.name in wanted else []


def _saving(graph: Graph, source: Node) -> int:
    """Multiply-adds saved by one linear layer in place of all nodes after `source`; 0 if they cannot be merged."""
    names = {node.name for node in _tail(graph, source)}
    if not names:
        return 0
    plain = sum(row.macs + row.linear_macs for row in cost(graph).rows if row.name in names)
    return plain - prod(source.shape) * prod(graph[graph.outputs[0]].shape)


def _replaced(graph: Graph, source: Node, tail: Sequence[Node]) -> Graph:
    weight, bias = _matrix(graph, source, tail)
    end, gone = tail[-1], {node.name for node in tail}
    nodes, inputs = [node for node in graph.nodes if node.name not in gone], (source.name,)
    if len(source.shape) > 1:
        flat = Node(f"{end.name}.flatten", "flatten", inputs, (prod(source.shape),))
        nodes, inputs = [*nodes, flat], (flat.name,)
    nodes.append(replace(end, op="linear", inputs=inputs, attrs={}))
    return graph.with_nodes(nodes, _without(graph, gone) | {f"{end.name}.weight": weight, f"{end.name}.bias": bias})


def _without(graph: Graph, gone: set[str]) -> dict[str, Tensor]:
    return {k: w for k, w in graph.weights.items() if k.rpartition(".")[0] not in gone}


def _matrix(graph: Graph, source: Node, tail: Sequence[Node]) -> tuple[Tensor, Tensor]:
    """Weight [classes, values] and bias [classes] of the tail, computed in float64.

    The weight is the gradient of the logits by the values of `source`, the bias the logits for values of 0.
    """
    parameters = {node.name: _doubles(graph, node) for node in tail}
    count, like = prod(tail[-1].shape), next(v for node in tail for v in graph.parameters(node).values())
    rows, bias = [], torch.empty(0)
    for part in torch.arange(count).split(ROWS):
        zeros = like.new_zeros(len(part), *source.shape, dtype=torch.float64).requires_grad_()
        with torch.enable_grad():
            values = {source.name: zeros}
            for node in tail:
                values[node.name] = evaluate(node, parameters[node.name], [values[name] for name in node.inputs])
            logits = values[tail[-1].name].flatten(1)
            (gradient,) = torch.autograd.grad(logits[torch.arange(len(part)), part].sum(), zeros)
        rows.append(gradient.flatten(1))
        bias = logits[0].detach()
    return torch.cat(rows).to(like.dtype), bias.to(like.dtype)


def _doubles(graph: Graph, node: Node) -> dict[str, Tensor]:
    return {name: value.detach().double() for name, value in graph.parameters(node).items()}
