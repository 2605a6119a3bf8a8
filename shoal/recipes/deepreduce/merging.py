"""The cost of a network whose linear runs of convolutions are merged, as DeepReDuce counts it (ICML'21, Tables 7, 8).

A run is a sequence of convolutions without a ReLU between them. The paper merges "the linear layers/Blocks" at
inference and counts a merged run as one 3x3 convolution. But two padded 3x3 convolutions equal one 5x5 convolution
inside the image and no convolution at its border. So the paper's count is that of a network that would have to be
trained. `fold` merges only where the result is exact and cheaper, and `cost` counts that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.networks.spec import Spec
from shoal.surgery.sites import ReluSite
from shoal.surgery.traced import Traced
from shoal.surgery.tracing import trace


def accountings(spec: Spec, network: nn.Module, full: nn.Module) -> dict[str, dict[str, int]]:
    """Convolutions (``convs``) and multiply-adds (``macs``) of `network`, the network of `spec`, counted in three ways.

    ``unmerged``: as trained. ``folded``: after `fold`; ``linear_macs`` are those of linear layers. ``paper``: merged as
    DeepReDuce counts, convolutions by the rule of its Table 7, multiply-adds by that of its Table 8. `full` is the same
    network with the ReLUs that `spec` drops.
    """
    plain, blocks, table_8 = (merged_cost(full, spec.shape, spec.dropped, m) for m in (UNMERGED, BLOCKS, TABLE_8))
    folded = cost(fold(trace(network, spec.shape)))
    return {
        "unmerged": {"convs": plain.convs, "macs": plain.macs},
        "folded": {"convs": folded.depth, "macs": folded.macs, "linear_macs": folded.linear_macs},
        "paper": {"convs": blocks.convs, "macs": table_8.macs},
    }


@dataclass(frozen=True)
class Merging:
    """Which runs count as merged. A run never spans two stages, and the stem is never merged.

    `stage_convs` is the number of convolutions that a culled stage becomes; None means all of its own. With `thinned`,
    the convolutions between two ReLUs of a thinned stage become one.
    """

    stage_convs: int | None = 1
    thinned: bool = True


UNMERGED = Merging(None, thinned=False)
"""Table 7, 17 convolutions: nothing is merged."""
STAGES = Merging(1, thinned=False)
"""Table 7, 11 convolutions: each culled stage becomes one convolution."""
BLOCKS = Merging(1)
"""Table 7, 8 and 7 convolutions: each thinned block becomes one convolution, too."""
TABLE_8 = Merging(2)
"""Table 8, multiply-adds: each culled stage becomes two convolutions."""


@dataclass(frozen=True)
class Merged:
    """Convolutions on the main path (the paper's #Conv, without shortcuts), and multiply-adds of all convolutions."""

    convs: int
    macs: int


def merged_cost(model: nn.Module, shape: tuple[int, ...], dropped: Collection[str], merging: Merging) -> Merged:
    """The cost of `model` without the ReLU sites `dropped`, counted as `merging` says.

    `shape` is the shape [C, H, W] of an image. `model` must still have the dropped ReLUs, because a convolution of the
    main path is found by the ReLU that reads it. A run is merged only where that takes fewer multiply-adds, which rules
    out depthwise convolutions. Projection shortcuts beside a merged run are merged into it. Raises ShoalError for a
    name in `dropped` that is not a ReLU site.
    """
    traced = Traced(model, shape)
    sites = [site for site in traced.sites if site.conv is not None]
    missing = set(dropped) - {site.name for site in sites}
    if missing:
        raise ShoalError(f"found no ReLU {min(missing)!r} behind a convolution; need names that relu_sites gives")
    count = _Count(traced.graph, sites)
    convs, macs = 0, sum(count.beside.values())
    for _, stage in groupby(_unique(sites), key=lambda site: site.stage):
        for run, left in _runs(list(stage), set(dropped), merging):
            plain, merged = count.plain(run), count.merged(run, left)
            better = len(run) > left and merged < plain + count.projections(run)
            convs += left if better else len(run)
            macs += merged - count.projections(run) if better else plain
    return Merged(convs, macs)


def _unique(sites: Iterable[ReluSite]) -> list[ReluSite]:
    """The first site of each convolution. The ReLU of a linear layer would name the last convolution again."""
    return list({site.conv: site for site in reversed(list(sites))}.values())[::-1]


def _runs(stage: Sequence[ReluSite], dropped: set[str], merging: Merging) -> list[tuple[list[ReluSite], int]]:
    """The stage's runs, each with the number of convolutions that it becomes when merged."""
    if stage[0].stage and all(site.name in dropped for site in stage):
        return [(list(stage), len(stage) if merging.stage_convs is None else merging.stage_convs)]
    if not merging.thinned:
        return [([site], 1) for site in stage]
    runs: list[list[ReluSite]] = [[]]
    for site in stage:
        runs[-1].append(site)
        if site.name not in dropped:
            runs.append([])
    return [(run, 1) for run in runs if run]


class _Count:
    """Multiply-adds of single and merged convolutions of one network."""

    def __init__(self, graph: Graph, sites: Sequence[ReluSite]) -> None:
        self.graph = graph
        self.macs = {row.name: row.macs for row in cost(graph).rows if row.op == "conv2d"}
        main = {site.conv for site in sites}
        self.beside = {name: macs for name, macs in self.macs.items() if name not in main}
        self.behind = {name: self._next_relu(name) for name in self.beside}

    def _next_relu(self, name: str) -> str | None:
        users = self.graph.users()
        while users[name]:
            name = users[name][0].name
            if self.graph[name].op == "relu":
                return name
        return None

    def plain(self, run: Sequence[ReluSite]) -> int:
        """Multiply-adds of the convolutions of `run`, not merged."""
        return sum(self.macs[str(site.conv)] for site in run)

    def projections(self, run: Sequence[ReluSite]) -> int:
        """Multiply-adds of the projection shortcuts that are added within `run`."""
        names = {site.name for site in run}
        return sum(macs for name, macs in self.beside.items() if self.behind[name] in names)

    def merged(self, run: Sequence[ReluSite], left: int) -> int:
        """Multiply-adds of `left` convolutions in place of `run`.

        The first one reads the run's input; all have the shape of the run's output.
        """
        first, last = self.graph[str(run[0].conv)], self.graph[str(run[-1].conv)]
        kernel = max(prod(self._weight(site).shape[2:]) for site in run)
        channels = self._weight(run[0]).shape[1] * first.attrs["groups"]
        return kernel * prod(last.shape) * (channels + (left - 1) * last.shape[0])

    def _weight(self, site: ReluSite) -> Tensor:
        return self.graph.weights[f"{site.conv}.weight"]
