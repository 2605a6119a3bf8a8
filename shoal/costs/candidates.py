"""Networks that meet a target of private inference, found before any training.

For each way of gating blocks, keeping an exit and reshaping: the greatest ReLU budget that the cost model allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from shoal.costs.machine import Machine
from shoal.costs.target import Forecast, Target
from shoal.errors import ShoalError
from shoal.exits.classifiers import exit_site
from shoal.graph.folding import drop_dead_relus, fold
from shoal.graph.graph import Graph
from shoal.networks.assembly import assemble, own_network
from shoal.networks.spec import Spec, committed
from shoal.pareto import front
from shoal.reduction.budget import Budget, allocate
from shoal.reduction.gates import branched_blocks
from shoal.surgery.sites import ReluSite
from shoal.surgery.traced import Traced
from shoal.surgery.tracing import trace

FINE = 1 / 256
"""Budgets are searched to within this share of themselves."""

PUBLISHED = ((0.0232, 11.5), (0.0447, 7.46), (0.089, 2.77), (0.18, 0.0), (1.0, 0.0))
"""Share of ReLUs kept and points of accuracy lost: ResNet18 on CIFAR-100, 78.05 % with all (SENet by shallow's Tables
1 and 2; SNL's list for the least)."""
PER_BLOCK, PER_EXIT, PER_HALVING = 0.35, 1.9, 4.5
"""Points lost with a gated block (shallow's Table 1: 0.66 with two, 1.49 with four), at the auxiliary exit (its Table
2), and with half the channels or half the resolution (deepreduce's Table 4: 3.5 to 5.5)."""

WORTH = 10.0
"""Candidates that would lose more points than this beyond the first one are left out."""


@dataclass(frozen=True)
class Candidate:
    """A network that meets the target: what `reduce` is to be told, what it will take, what it may lose.

    `budget` is that of all sites, as `reduce` takes it; ReLUs of gated blocks and of layers behind a kept exit are
    part of it and not of the network. `width` and `resolution` are factors on the base network's. `lost` orders
    candidates, see `points_lost`.
    """

    budget: int
    gated: tuple[str, ...]
    keep: str
    width: float
    resolution: float
    forecast: Forecast
    lost: float


def points_lost(share: float, gated: int, exit: bool, halvings: float) -> float:
    """Points of accuracy that published networks lost so: an order among candidates, no forecast for other data.

    `share` is that of the unreduced network's ReLUs; `halvings` counts halved widths and resolutions.
    """
    shares, points = (np.array(column) for column in zip(*PUBLISHED, strict=True))
    at = math.log(max(share, 1e-9))
    steep = (points[0] - points[1]) / math.log(shares[1] / shares[0])
    below = max(0.0, math.log(shares[0]) - at) * steep
    relus = float(np.interp(at, np.log(shares), points)) + below
    return relus + PER_BLOCK * gated + PER_EXIT * exit + PER_HALVING * halvings


@dataclass(frozen=True)
class Structure:
    """A network whose ReLU budget is open: its folded graph, and the sites of the network that it was cut from."""

    spec: Spec
    gated: tuple[str, ...]
    exit: bool
    sites: tuple[ReluSite, ...]
    sensitivity: Mapping[str, float]
    graph: Graph

    def at(self, total: int) -> Graph:
        """The graph with what a budget of `total` leaves to each site that is still there.

        Which positions are kept does not matter to any cost.
        """
        counts = allocate(self.sites, self.sensitivity, total).counts
        weights = dict(self.graph.weights)
        for node in self.graph.nodes:
            if node.op == "relu" and node.name in counts:
                mask = torch.arange(math.prod(node.shape)) < counts[node.name]
                weights[f"{node.name}.mask"] = mask.view(node.shape)
        return drop_dead_relus(replace(self.graph, weights=weights))


def structures(spec: Spec, traced: Traced, sensitivity: Mapping[str, float] | None) -> Iterator[Structure]:
    """Every way of cutting a network: no block gated, then one more each time, with the final classifier or the exit.

    `traced` is the base network of `spec`. Blocks are gated in the order of their assigned ratios, the least first, as
    a rising d_th would. `sensitivity` divides budgets among sites; None divides them by size.
    """
    base, sites = traced.module, traced.sites
    eta = sensitivity or {site.name: float(site.relus) for site in sites}
    last = {site.name for site in sites if site.stage == sites[-1].stage}
    staged = len(last) < len(sites)
    for gated in _gatings(traced, allocate(sites, eta, max(1, sum(s.relus for s in sites) // 10))):
        yield Structure(spec, gated, False, sites, eta, _cut(spec, base, gated, None))
        # A block behind the exit goes with it: gating it makes no other network.
        if staged and not last & set(gated):
            yield Structure(spec, gated, True, sites, eta, _cut(spec, base, gated, exit_site(sites)))


def _gatings(traced: Traced, budget: Budget) -> Iterator[tuple[str, ...]]:
    blocks = branched_blocks(traced.blocks, budget, math.inf)
    order = [block.name for block in sorted(blocks, key=lambda block: budget.ratio(block.name))]
    return (tuple(order[:count]) for count in range(len(order) + 1))


def _cut(spec: Spec, base: nn.Module, gated: tuple[str, ...], exit: str | None) -> Graph:
    grown = replace(spec, branches=gated, exits=(exit,) if exit else ())
    return fold(trace(assemble(committed(grown, 0 if exit else -1), base).eval(), spec.shape))


def greatest(body: Structure, target: Target, machine: Machine | None = None) -> tuple[int, Forecast] | float:
    """The greatest budget of `body` within `target` and its forecast; or, where there is none, what the least takes.

    A budget at most `FINE` above it is beyond the target. Signs are compared in words of 64, so that a ReLU more can
    also cost a little less: the search takes costs for rising and may end a few ReLUs below such a dip.
    """

    def price(total: int) -> Forecast:
        return target.forecast(body.at(total), machine)

    low, high = 1, sum(site.relus for site in body.sites)
    best = price(low)
    if target.taken(best) > target.limit:
        return target.taken(best)
    whole = price(high)
    if target.taken(whole) <= target.limit:
        return high, whole
    while high - low > max(1, int(low * FINE)):
        middle = math.isqrt(low * high) if high > 16 * low else (low + high) // 2
        found = price(middle)
        if target.taken(found) <= target.limit:
            low, best = middle, found
        else:
            high = middle
    return low, best


def plan(
    spec: Spec,
    base: nn.Module,
    target: Target,
    *,
    machine: Machine | None = None,
    sensitivity: Mapping[str, float] | None = None,
    reshapes: Sequence[tuple[float, float]] = (),
    say: Callable[[str], None] = lambda text: None,
) -> list[Candidate]:
    """Networks that meet `target`, none with less of everything than another, least `points_lost` first.

    `reshapes` are further (width, resolution) factors of a zoo network to try, each of which needs a teacher of its
    own. `say` hears of each structure. Raises ShoalError when nothing meets the target, with the least that was found.
    """
    whole = Traced(base, spec.shape)
    everything = sum(site.relus for site in whole.sites)
    found, least = list[Candidate](), math.inf
    for width, resolution in ((1.0, 1.0), *reshapes):
        shaped = replace(spec, width=spec.width * width, resolution=spec.resolution * resolution)
        if shaped == spec:
            traced, eta = whole, sensitivity
        else:
            traced, eta = Traced(own_network(shaped), shaped.shape), None
        for body in structures(shaped, traced, eta):
            say(_name(body, width, resolution))
            result = greatest(body, target, machine)
            if isinstance(result, float):
                least = min(least, result)
            else:
                found.append(_candidate(body, width, resolution, everything, *result))
    if not found:
        raise ShoalError(
            f"found no network cut from {spec.base} within {target}; need at least {target.amount(least)}; "
            "raise the target, or allow other widths and resolutions (--reshape)"
        )
    return _undominated(found)


def _name(body: Structure, width: float, resolution: float) -> str:
    reshaped = "" if width == resolution == 1.0 else f", width {width:g}, resolution {resolution:g}"
    return f"{len(body.gated)} blocks gated, {'auxiliary exit' if body.exit else 'final classifier'}{reshaped}"


def _candidate(
    body: Structure, width: float, resolution: float, everything: int, budget: int, found: Forecast
) -> Candidate:
    halvings = -math.log2(width) - math.log2(resolution)
    lost = points_lost(found.relus / everything, len(body.gated), body.exit, halvings)
    return Candidate(budget, body.gated, "auxiliary" if body.exit else "final", width, resolution, found, lost)


def _undominated(found: Sequence[Candidate]) -> list[Candidate]:
    # The more of the network is left, the better.
    best = sorted(front([(-c.forecast.relus, -c.forecast.macs, -c.forecast.depth) for c in found], ties=True))
    worth = min(c.lost for c in found) + WORTH
    return sorted((found[i] for i in best if found[i].lost <= worth), key=lambda c: (c.lost, -c.forecast.relus))
