"""Figures of one network for summaries: test accuracy, counts, and its linear runs by three accountings."""

from __future__ import annotations

from typing import Any

from torch import nn

from shoal.data.dataset import Dataset
from shoal.graph.counting import Cost, cost
from shoal.networks.spec import Spec
from shoal.surgery.tracing import trace
from shoal.training.evaluation import evaluate
from shoal.training.settings import Settings


def counts(total: Cost) -> dict[str, int]:
    """The totals of a `cost` that tables show."""
    names = ("relus", "comparisons", "quadratics", "macs", "depth", "params", "linear_macs", "relu_layers")
    return {name: getattr(total, name) for name in names}


def figures(network: nn.Module, data: Dataset, spec: Spec, settings: Settings) -> dict[str, Any]:
    """Test accuracy and counts."""
    accuracy = evaluate(network, data, data.test, settings)[-1]
    return {"accuracy": accuracy} | counts(cost(trace(network, spec.shape)))
