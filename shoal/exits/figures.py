"""Costs and accuracies of every classifier of a network, and the accuracy of their ensembles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor, nn

from shoal.data.dataset import Dataset, Split
from shoal.graph.counting import Cost, cost
from shoal.graph.graph import Graph, live
from shoal.outputs import forward
from shoal.storage.summary import ExitRow
from shoal.surgery.tracing import trace
from shoal.training.evaluation import evaluate
from shoal.training.settings import Settings


@dataclass(frozen=True)
class ExitCosts:
    """The cost for one image of each of K classifiers, weakest first.

    `alone` counts only what the classifier's logits depend on. (In MSDNet, the finer scales at an exit's depth are
    first counted with the next exit.) `in_order` also counts all weaker classifiers.
    """

    alone: tuple[Cost, ...]
    in_order: tuple[Cost, ...]

    @property
    def macs(self) -> tuple[int, ...]:
        """Multiply-adds of convolutions and linear layers, for each classifier alone."""
        return tuple(multiply_adds(total) for total in self.alone)

    @property
    def macs_in_order(self) -> tuple[int, ...]:
        """Multiply-adds of convolutions and linear layers, for each classifier and all weaker ones."""
        return tuple(multiply_adds(total) for total in self.in_order)


def exit_costs(graph: Graph) -> ExitCosts:
    """Count the costs of every output of `graph`."""
    ends = range(1, len(graph.outputs) + 1)
    return ExitCosts(tuple(_cut(graph, end - 1, end) for end in ends), tuple(_cut(graph, 0, end) for end in ends))


def multiply_adds(total: Cost) -> int:
    """Multiply-adds of convolutions and linear layers in `total`."""
    return total.macs + total.linear_macs


def _cut(graph: Graph, first: int, end: int) -> Cost:
    """The cost of the nodes that outputs `first` to `end` - 1 depend on."""
    cut = replace(graph, outputs=graph.outputs[first:end])
    names = live(cut)
    return cost(cut.with_nodes([node for node in graph.nodes if node.name in names], graph.weights))


class Ensembles(nn.Module):
    """A network's classifiers, followed by two ensembles of them as further classifiers.

    The ensembles are the mean of the logits, and the logarithm of the mean softmax output.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, classes] of each classifier, weakest first, then of both ensembles, for images [N, C, H, W]."""
        logits = forward(self.model, x).logits
        stacked = torch.stack(logits).float()
        return (*logits, stacked.mean(0), torch.log_softmax(stacked, 2).logsumexp(0) - math.log(len(logits)))


class Exits(TypedDict):
    """Figures of every classifier of one network, weakest first, and the accuracy of both ensembles in percent."""

    exits: list[ExitRow]
    ensemble: dict[str, float]


def exit_figures(model: nn.Module, data: Dataset, split: Split, settings: Settings) -> Exits:
    """Figures of every classifier of `model` on `split`, weakest first, and of both ensembles.

    The ensembles have accuracies only, in percent.
    """
    *own, logits, softmax = evaluate(Ensembles(model).train(model.training), data, split, settings)
    costs = exit_costs(trace(model, data.shape))
    columns = zip(own, costs.alone, costs.macs, costs.macs_in_order, strict=True)
    rows = [
        ExitRow(accuracy=a, params=alone.params, relus=alone.relus, macs=macs, cascaded_macs=after)
        for a, alone, macs, after in columns
    ]
    return Exits(exits=rows, ensemble={"logits": logits, "softmax": softmax})
