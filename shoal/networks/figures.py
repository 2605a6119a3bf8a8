"""Figures of one network for summaries: test accuracy, counts, and its linear runs by three accountings."""

from __future__ import annotations

from typing import Any

from torch import nn

from shoal.cost import Cost, cost
from shoal.data import Dataset
from shoal.fold import fold
from shoal.merging import BLOCKS, TABLE_8, UNMERGED, merged_cost
from shoal.spec import Spec
from shoal.surgery import trace
from shoal.train import Settings, evaluate


def counts(total: Cost) -> dict[str, int]:
    """The totals of a `cost` that tables show."""
    names = ("relus", "comparisons", "quadratics", "macs", "depth", "params", "linear_macs", "relu_layers")
    return {name: getattr(total, name) for name in names}


def figures(network: nn.Module, data: Dataset, spec: Spec, settings: Settings) -> dict[str, Any]:
    """Test accuracy and counts."""
    accuracy = evaluate(network, data, data.test, settings)[-1]
    return {"accuracy": accuracy} | counts(cost(trace(network, spec.shape)))


def accountings(spec: Spec, network: nn.Module, full: nn.Module) -> dict[str, dict[str, int]]:
    """Convolutions on the main path and multiply-adds of `network`, the network of `spec`.

    `full` has the ReLUs that `spec` drops. ``unmerged``: as trained. ``folded``: after `fold`, which merges what is
    exact and cheaper; `linear_macs` are those of linear layers. ``paper``: merged as DeepReDuce counts, convolutions
    by the rule of its Table 7, multiply-adds by that of its Table 8.
    """
    plain, blocks, table_8 = (merged_cost(full, spec.shape, spec.dropped, m) for m in (UNMERGED, BLOCKS, TABLE_8))
    folded = cost(fold(trace(network, spec.shape)))
    return {
        "unmerged": {"convs": plain.convs, "macs": plain.macs},
        "folded": {"convs": folded.depth, "macs": folded.macs, "linear_macs": folded.linear_macs},
        "paper": {"convs": blocks.convs, "macs": table_8.macs},
    }
