"""What a graph costs: one table of formulas, exact integers; and protocol models in bytes, rounds and seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from shoal.graph.graph import Graph
from shoal.graph.max_pool import comparisons
from shoal.graph.ops import Node


@dataclass(frozen=True)
class Row:
    """Cost of one node for one image. A MAC is one multiply-add; `values` is the number of result elements."""

    name: str
    op: str
    shape: tuple[int, ...]
    relus: int = 0
    macs: int = 0
    linear_macs: int = 0
    quadratics: int = 0
    comparisons: int = 0


@dataclass(frozen=True)
class Cost:
    """Exact counts for one image.

    `macs` are those of convolutions (1x1 shortcuts included), the papers' convention; `linear_macs` those of linear
    layers. `quadratics` are values that are squared, each a product of two secrets. `comparisons` are those of max
    pools (`graph.max_pool`) and, two a value, of ReLU6, which the papers' ReLU counts leave out. `depth` is the number
    of convolutions on the longest path, so shortcuts do not count. `params` counts every parameter once, those of
    unknown operations too. `unknown` names operations without a formula: their other costs are missing from the totals
    and never taken as zero silently.
    """

    rows: tuple[Row, ...]
    depth: int
    params: int
    unknown: tuple[str, ...]

    @property
    def relus(self) -> int:
        """ReLU operations."""
        return sum(row.relus for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-adds of the convolutions."""
        return sum(row.macs for row in self.rows)

    @property
    def comparisons(self) -> int:
        """Comparisons that are no ReLU of the network's: those of max pools and of ReLU6."""
        return sum(row.comparisons for row in self.rows)

    @property
    def linear_macs(self) -> int:
        """Multiply-adds of the linear layers."""
        return sum(row.linear_macs for row in self.rows)

    @property
    def quadratics(self) -> int:
        """Squares of values."""
        return sum(row.quadratics for row in self.rows)

    @property
    def relu_layers(self) -> int:
        """Layers with at least one ReLU: what rounds are paid for."""
        return sum(row.relus > 0 for row in self.rows)


def _relus(graph: Graph, node: Node) -> dict[str, int]:
    mask = graph.weights.get(f"{node.name}.mask")
    return {"relus": prod(node.shape) if mask is None else int(mask.sum())}


def _quadratics(graph: Graph, node: Node) -> dict[str, int]:
    kept = int(graph.weights[f"{node.name}.mask"].sum())
    return {"relus": kept, "quadratics": prod(node.shape) - kept}


def _conv(graph: Graph, node: Node) -> dict[str, int]:
    weight = graph.weights[f"{node.name}.weight"]
    return {"macs": weight[0].numel() * prod(node.shape)}


def _linear(graph: Graph, node: Node) -> dict[str, int]:
    return {"linear_macs": graph.weights[f"{node.name}.weight"].numel()}


def _max_pool(graph: Graph, node: Node) -> dict[str, int]:
    return {"comparisons": comparisons(node, graph[node.inputs[0]].shape)}


def _relu6(graph: Graph, node: Node) -> dict[str, int]:
    return {"comparisons": 2 * prod(node.shape)}  # min(max(x, 0), 6)


def _free(graph: Graph, node: Node) -> dict[str, int]:
    return {}


COUNTERS: dict[str, Callable[[Graph, Node], dict[str, int]]] = {
    "conv2d": _conv,
    "linear": _linear,
    "relu": _relus,
    "quadratic": _quadratics,
    "relu6": _relu6,
    "max_pool2d": _max_pool,
    **dict.fromkeys(("input", "batch_norm", "affine", "add", "sub", "avg_pool2d", "mean"), _free),
    **dict.fromkeys(("flatten", "concat", "subsample", "take", "pad"), _free),
}
"""Operation -> formula. Additions, pools, moves and (folded) batch norms count nothing, as in the papers."""
BUFFERS = ("mean", "var", "mask", "scale", "shift")
"""Tensors of a node that are not its parameters."""


def cost(graph: Graph) -> Cost:
    """Count `graph`, row by row."""
    rows, unknown = [], []
    for node in graph.nodes:
        if node.op in COUNTERS:
            rows.append(Row(node.name, node.op, node.shape, **COUNTERS[node.op](graph, node)))
        else:
            unknown.append(f"{node.name} ({node.attrs.get('target', node.op)})")
    return Cost(tuple(rows), _depth(graph), _params(graph), tuple(unknown))


def _params(graph: Graph) -> int:
    # By identity: a layer that is called twice is two nodes with one tensor.
    trained = (w for k, w in graph.weights.items() if k.rpartition(".")[2] not in BUFFERS)
    return sum({id(w): w.numel() for w in trained}.values())


def is_affine(graph: Graph, node: Node) -> bool:
    """True for a batch norm that `fold` turned into a 1x1 depthwise convolution."""
    weight = graph.weights.get(f"{node.name}.weight")
    return node.op == "conv2d" and weight is not None and tuple(weight.shape[1:]) == (1, 1, 1)


def _depth(graph: Graph) -> int:
    depth: dict[str, int] = {}
    for node in graph.nodes:
        own = node.op == "conv2d" and not is_affine(graph, node)
        depth[node.name] = max((depth[name] for name in node.inputs), default=0) + own
    return max(depth[name] for name in graph.outputs)
