"""Test accuracy and counts of a network, for summaries."""

from __future__ import annotations

from torch import nn

from shoal.data.dataset import Dataset
from shoal.graph.counting import Cost, cost
from shoal.networks.spec import Spec
from shoal.storage.summary import Counts, Figures
from shoal.surgery.tracing import trace
from shoal.training.evaluation import evaluate
from shoal.training.settings import Settings


def counts(total: Cost) -> Counts:
    """The totals of `total` that tables and summaries show."""
    return Counts(
        relus=total.relus,
        comparisons=total.comparisons,
        quadratics=total.quadratics,
        macs=total.macs,
        depth=total.depth,
        params=total.params,
        linear_macs=total.linear_macs,
        relu_layers=total.relu_layers,
    )


def figures(network: nn.Module, data: Dataset, spec: Spec, settings: Settings) -> Figures:
    """Accuracy of the last exit on the test set, in percent, its number of images, and the counts of `network`."""
    accuracy = evaluate(network, data, data.test, settings)[-1]
    return Figures(accuracy=accuracy, test_images=len(data.test), **counts(cost(trace(network, spec.shape))))
