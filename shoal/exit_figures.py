"""What every classifier of one network is worth and costs, and what they are worth together."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shoal.cost import Cost, cost
from shoal.data import Dataset, Split
from shoal.graph import Graph, live
from shoal.outputs import forward
from shoal.surgery import trace
from shoal.train import Settings, evaluate


class Ensembles(nn.Module):
    """A network's classifiers and two ensembles of them, as further classifiers at the end.

    They are the mean of the logits, and the logarithm of the mean of the softmax outputs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, classes] of each classifier, weak to strong, then those of both ensembles."""
        logits = forward(self.model, x).logits
        stacked = torch.stack(logits).float()
        return (*logits, stacked.mean(0), torch.log_softmax(stacked, 2).logsumexp(0) - math.log(len(logits)))


@dataclass(frozen=True)
class ExitFigures:
    """One classifier: accuracy in percent, parameters on the way to it, multiply-adds and ReLUs for one image.

    `macs` (of convolutions and linear layers) are those of the classifier alone, `cascaded_macs` those of all weaker
    ones, too, which ran before it.
    """

    accuracy: float
    params: int
    relus: int
    macs: int
    cascaded_macs: int


def exit_figures(model: nn.Module, data: Dataset, split: Split, settings: Settings) -> dict[str, Any]:
    """Figures of every classifier of `model` on `split`, weak to strong, and both ensembles' accuracy in percent."""
    *own, logits, softmax = evaluate(Ensembles(model), data, split, settings)
    graph = trace(model, data.shape)
    rows = []
    for index, accuracy in enumerate(own):
        alone, cascade = _needed(graph, index, index + 1), _needed(graph, 0, index + 1)
        rows.append(asdict(ExitFigures(accuracy, alone.params, alone.relus, _macs(alone), _macs(cascade))))
    return {"exits": rows, "ensemble": {"logits": logits, "softmax": softmax}}


def _macs(total: Cost) -> int:
    return total.macs + total.linear_macs


def _needed(graph: Graph, first: int, end: int) -> Cost:
    """The cost of what classifiers `first` to `end` - 1 need."""
    cut = replace(graph, outputs=graph.outputs[first:end])
    names = live(cut)
    return cost(cut.with_nodes([node for node in graph.nodes if node.name in names], graph.weights))
