"""Max pools as trees of comparisons, max(a, b) = a + relu(b - a), in operations that every executor has.

The maximum is taken along one axis first and then along the other, so that overlapping windows share the maxima of
their rows. A k x k pool needs ceil(log2 k) ReLU layers per axis. It needs k^2 - 1 comparisons per window if windows do
not overlap, and fewer if they do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.errors import ShoalError
from shoal.graph.graph import Graph
from shoal.graph.ops import Node

Windows = list[list[int]]
"""For each result along one axis, the input positions whose maximum it is."""


def windows(node: Node, size: int, axis: int) -> Windows:
    """The windows of a max pool along `axis` (0 vertical, 1 horizontal), which has `size` positions.

    A position in the padding is replaced by the nearest position of the window inside the map. Repeating a value does
    not change a maximum, so no substitute for minus infinity is needed. Raises ShoalError for a window that lies
    entirely in the padding.
    """
    kernel, stride = node.attrs["kernel"][axis], node.attrs["stride"][axis]
    padding, dilation = (node.attrs.get(k, [d, d])[axis] for k, d in (("padding", 0), ("dilation", 1)))
    table = []
    for i in range(node.shape[1 + axis]):
        reach = [i * stride - padding + j * dilation for j in range(kernel)]
        inside = [p for p in reach if 0 <= p < size]
        if not inside:
            raise ShoalError(
                f"found a window that lies in the padding at {node.name}; need at least one value in each; "
                "use less padding or dilation"
            )
        table.append([min(inside, key=lambda q, p=p: abs(p - q)) for p in reach])  # type: ignore[misc]
    return table


def _used(rows: Windows) -> list[int]:
    return sorted({p for window in rows for p in window})


def comparisons(node: Node, shape: tuple[int, ...]) -> int:
    """Number of comparisons of the max pool `node` on one input of `shape` [C, H, W]: the ReLUs of its tree."""
    channels, down, right = node.shape
    high, wide = node.attrs["kernel"]
    rows = len(_used(windows(node, shape[1], 0)))
    return channels * ((wide - 1) * rows * right + (high - 1) * down * right)


def expand_max_pools(graph: Graph) -> Graph:
    """A graph that computes the same, with every max pool as a tree of comparisons.

    The last node of a tree has the pool's name. Raises ShoalError for a pool window without any value.
    """
    shapes = {node.name: node.shape for node in graph.nodes}
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes += _Tree(node).build(shapes[node.inputs[0]]) if node.op == "max_pool2d" else [node]
    return graph.with_nodes(nodes, graph.weights)


class _Tree:
    """The nodes that one max pool becomes."""

    def __init__(self, pool: Node) -> None:
        self.pool = pool
        self.nodes: list[Node] = []

    def build(self, shape: tuple[int, ...]) -> list[Node]:
        """All nodes of the tree, for an input of `shape` [C, H, W]."""
        rows, columns = windows(self.pool, shape[1], 0), windows(self.pool, shape[2], 1)
        used, whole = _used(rows), Node(self.pool.inputs[0], "input", (), shape)
        place = {p: i for i, p in enumerate(used)}
        needed = None if len(used) == shape[1] else used
        high, wide = self.pool.attrs["kernel"]
        best = self._largest([self._take(whole, [None, needed, [w[j] for w in columns]]) for j in range(wide)])
        self._largest([self._take(best, [None, [place[w[j]] for w in rows], None]) for j in range(high)])
        return [*self.nodes[:-1], replace(self.nodes[-1], name=self.pool.name)]

    def _largest(self, terms: list[Node]) -> Node:
        """A node with the elementwise maximum of `terms`; all comparisons of one tree level are in one ReLU layer."""
        while len(terms) > 1:
            half = len(terms) // 2
            a, b = self._joined(terms[:half]), self._joined(terms[half : 2 * half])
            more = self._add("relu", (self._add("sub", (b, a), a.shape),), a.shape)
            terms = [*self._parted(self._add("add", (a, more), a.shape), half), *terms[2 * half :]]
        return terms[0]

    def _joined(self, terms: list[Node]) -> Node:
        shape = (sum(t.shape[0] for t in terms), *terms[0].shape[1:])
        return self._add("concat", tuple(terms), shape) if len(terms) > 1 else terms[0]

    def _parted(self, node: Node, count: int) -> list[Node]:
        size = node.shape[0] // count
        parts = [list(range(i * size, (i + 1) * size)) for i in range(count)]
        return [self._take(node, [part, None, None]) for part in parts] if count > 1 else [node]

    def _take(self, source: Node, index: list[list[int] | None]) -> Node:
        shape = tuple(n if i is None else len(i) for n, i in zip(source.shape, index, strict=True))
        return self._add("take", (source,), shape, {"index": index})

    def _add(
        self, op: str, inputs: tuple[Node, ...], shape: tuple[int, ...], attrs: dict[str, Any] | None = None
    ) -> Node:
        name = f"{self.pool.name}.max.{op}{len(self.nodes) + 1}"  # the count makes it unique
        self.nodes.append(Node(name, op, tuple(n.name for n in inputs), shape, attrs or {}))
        return self.nodes[-1]
