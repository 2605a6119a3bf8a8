"""Exact counts of a graph: ReLUs, multiply-adds, depth and parameters, by one formula per operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from shoal.errors import ShoalError
from shoal.graph.graph import Graph
from shoal.graph.max_pool import comparisons
from shoal.graph.ops import Node


@dataclass(frozen=True)
class Row:
    """Counts of one node for one image. A MAC is one multiply-add; `shape` is that of the node's result.

    A parameter that several nodes share counts for the first of them.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    relus: int = 0
    macs: int = 0
    linear_macs: int = 0
    quadratics: int = 0
    comparisons: int = 0
    params: int = 0


@dataclass(frozen=True)
class Cost:
    """Exact counts for one image.

    `depth` is the number of convolutions on the longest path, so shortcuts do not count. `params` counts every
    parameter once, including those of unknown operations. `unknown` names the operations without a formula; the totals
    do not include their other costs, so a caller has to report them.
    """

    rows: tuple[Row, ...]
    depth: int
    params: int
    unknown: tuple[str, ...]

    @property
    def relus(self) -> int:
        """ReLU operations, those of max pools and ReLU6 not included."""
        return sum(row.relus for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-adds of the convolutions, 1x1 shortcuts included; the papers count these only."""
        return sum(row.macs for row in self.rows)

    @property
    def comparisons(self) -> int:
        """Comparisons of max pools (`graph.max_pool`) and of ReLU6 (two per value); papers' ReLU counts omit them."""
        return sum(row.comparisons for row in self.rows)

    @property
    def linear_macs(self) -> int:
        """Multiply-adds of the linear layers."""
        return sum(row.linear_macs for row in self.rows)

    @property
    def quadratics(self) -> int:
        """Values that are squared; in private inference each square is a product of two secret values."""
        return sum(row.quadratics for row in self.rows)

    @property
    def relu_layers(self) -> int:
        """Layers with at least one ReLU; the number of communication rounds depends on it."""
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
"""Operation -> formula. Additions, average pools, data movement and batch norms count as 0, as in the papers."""
BUFFERS = ("mean", "var", "mask", "scale", "shift")
"""Names of a node's tensors that do not count as parameters."""


def cost(graph: Graph) -> Cost:
    """The exact counts of `graph` for one image. Raises ShoalError for a module that is not traced."""
    if not isinstance(graph, Graph):
        raise ShoalError(
            f"found a {type(graph).__name__} to count; need a shoal.Graph; use shoal.count(model, shape), "
            "which traces it"
        )
    rows, unknown, params = [], [], _params_by_node(graph)
    for node in graph.nodes:
        if node.op in COUNTERS:
            own = COUNTERS[node.op](graph, node)
            rows.append(Row(node.name, node.op, node.shape, **own, params=params.get(node.name, 0)))
        else:
            unknown.append(f"{node.name} ({node.attrs.get('target', node.op)})")
    return Cost(tuple(rows), _depth(graph), sum(params.values()), tuple(unknown))


def _params_by_node(graph: Graph) -> dict[str, int]:
    # Count by identity, since a layer that is called twice is two nodes with the same tensor.
    seen: set[int] = set()
    found: dict[str, int] = {}
    for key, weight in graph.weights.items():
        name, _, kind = key.rpartition(".")
        if kind not in BUFFERS and id(weight) not in seen:
            seen.add(id(weight))
            found[name] = found.get(name, 0) + weight.numel()
    return found


def is_affine(graph: Graph, node: Node) -> bool:
    """Whether `node` is a 1x1 depthwise convolution, the form that `fold` gives to a batch norm with no layer before.

    `depth` does not count it.
    """
    weight = graph.weights.get(f"{node.name}.weight")
    return node.op == "conv2d" and weight is not None and tuple(weight.shape[1:]) == (1, 1, 1)


def _depth(graph: Graph) -> int:
    depth: dict[str, int] = {}
    for node in graph.nodes:
        own = node.op == "conv2d" and not is_affine(graph, node)
        depth[node.name] = max((depth[name] for name in node.inputs), default=0) + own
    return max(depth[name] for name in graph.outputs)
