"""What each classifier of a network takes, alone and after all weaker ones have run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoal.graph.counting import Cost, cost
from shoal.graph.graph import Graph, live


@dataclass(frozen=True)
class ExitCosts:
    """The cost of each of K classifiers for one image, weak to strong.

    `alone`: of what its logits are computed from and nothing else (MSDNet's finer scales at an exit's depth count from
    the next exit on). `in_order`: when all weaker ones have been asked before.
    """

    alone: tuple[Cost, ...]
    in_order: tuple[Cost, ...]

    @property
    def macs(self) -> tuple[int, ...]:
        """Multiply-adds of each alone, of convolutions and linear layers."""
        return tuple(multiply_adds(total) for total in self.alone)

    @property
    def macs_in_order(self) -> tuple[int, ...]:
        """Multiply-adds up to each, of convolutions and linear layers."""
        return tuple(multiply_adds(total) for total in self.in_order)


def exit_costs(graph: Graph) -> ExitCosts:
    """Count every output of `graph`."""
    ends = range(1, len(graph.outputs) + 1)
    return ExitCosts(tuple(_cut(graph, end - 1, end) for end in ends), tuple(_cut(graph, 0, end) for end in ends))


def multiply_adds(total: Cost) -> int:
    """Those of convolutions and linear layers."""
    return total.macs + total.linear_macs


def _cut(graph: Graph, first: int, end: int) -> Cost:
    """The cost of what outputs `first` to `end` - 1 need."""
    cut = replace(graph, outputs=graph.outputs[first:end])
    names = live(cut)
    return cost(cut.with_nodes([node for node in graph.nodes if node.name in names], graph.weights))
