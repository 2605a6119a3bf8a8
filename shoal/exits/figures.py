"""What every classifier of one network is worth and costs, and what they are worth together."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.data.dataset import Dataset, Split
from shoal.exits.costs import exit_costs
from shoal.outputs import forward
from shoal.surgery.tracing import trace
from shoal.training.evaluation import evaluate
from shoal.training.settings import Settings


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
    *own, logits, softmax = evaluate(Ensembles(model).train(model.training), data, split, settings)
    costs = exit_costs(trace(model, data.shape))
    columns = zip(own, costs.alone, costs.macs, costs.macs_in_order, strict=True)
    rows = [asdict(ExitFigures(a, alone.params, alone.relus, macs, after)) for a, alone, macs, after in columns]
    return {"exits": rows, "ensemble": {"logits": logits, "softmax": softmax}}
