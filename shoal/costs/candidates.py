"""Candidate networks that meet a target for private inference, found before any training.

For each combination of gated blocks, kept exit and reshaping this is the largest ReLU budget that meets the target
according to the cost model.
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
"""Relative precision of the search for the largest budget."""

PUBLISHED = ((0.0232, 11.5), (0.0447, 7.46), (0.089, 2.77), (0.18, 0.0), (1.0, 0.0))
"""(fraction of ReLUs kept, percentage points of accuracy lost) of ResNet18 on CIFAR-100, from 78.05 % with all ReLUs.

Sources: SENet's results in Tables 1 and 2 of shallow; SNL's list for the smallest fraction.
"""
PER_BLOCK, PER_EXIT = 0.35, 1.9
"""Percentage points lost per gated block and at the auxiliary exit.

Sources: shallow's Table 1 (0.66 with two blocks, 1.49 with four) and Table 2.
"""
PER_HALF_WIDTH, PER_HALF_RESOLUTION = 2.2, 4.8
"""Percentage points lost per halving of the width, and of the resolution.

Sources: deepreduce's Tables 2 and 4. Half the channels: 74.72 to 72.68 with three thinned stages, 71.95 to 69.50 with
two. Half the feature map: 74.72 to 68.68, and 71.95 to 68.41. These are the means.
"""

WORTH = 10.0
"""Candidates that lose more percentage points than the best one plus this are left out."""


@dataclass(frozen=True)
class Candidate:
    """A network that meets the target: the options for `reduce`, its forecast cost and its estimated loss.

    `budget` is the ReLU budget of all sites, as `reduce` takes it. It includes ReLUs of gated blocks and of layers
    after a kept exit, which the final network does not have. `keep` is ``auxiliary`` or ``final``, the classifier that
    is kept. `width` and `resolution` are factors relative to the base network. `lost` is `points_lost`.
    """

    budget: int
    gated: tuple[str, ...]
    keep: str
    width: float
    resolution: float
    forecast: Forecast
    lost: float


def points_lost(share: float, gated: int, exit: bool, width: float = 1.0, resolution: float = 1.0) -> float:
    """Percentage points of accuracy that published networks lost with such a reduction.

    It serves to order candidates and does not forecast the loss on other data. `share` is the fraction of the unreduced
    network's ReLUs that is kept. `gated` is the number of gated blocks, `exit` says whether the auxiliary exit is kept,
    and `width` and `resolution` are factors relative to the base network.
    """
    shares, points = (np.array(column) for column in zip(*PUBLISHED, strict=True))
    at = math.log(max(share, 1e-9))
    steep = (points[0] - points[1]) / math.log(shares[1] / shares[0])
    below = max(0.0, math.log(shares[0]) - at) * steep
    relus = float(np.interp(at, np.log(shares), points)) + below
    reshaped = -PER_HALF_WIDTH * math.log2(width) - PER_HALF_RESOLUTION * math.log2(resolution)
    return relus + PER_BLOCK * gated + PER_EXIT * exit + reshaped


@dataclass(frozen=True)
class Structure:
    """A reduced network whose ReLU budget is not chosen yet.

    `graph` is its folded graph with all ReLUs. `sites` are those of the network that it was cut from, and `sensitivity`
    has a weight for each of them. `exit` says whether the auxiliary exit is kept.
    """

    spec: Spec
    gated: tuple[str, ...]
    exit: bool
    sites: tuple[ReluSite, ...]
    sensitivity: Mapping[str, float]
    graph: Graph

    def at(self, total: int) -> Graph:
        """The graph with a total budget of `total` ReLUs, divided among all sites; some sites may not be in the graph.

        The first positions of a site are kept, since costs do not depend on which ones. Raises ShoalError as `allocate`
        does.
        """
        counts = allocate(self.sites, self.sensitivity, total).counts
        weights = dict(self.graph.weights)
        for node in self.graph.nodes:
            if node.op == "relu" and node.name in counts:
                mask = torch.arange(math.prod(node.shape)) < counts[node.name]
                weights[f"{node.name}.mask"] = mask.view(node.shape)
        return drop_dead_relus(replace(self.graph, weights=weights))


def structures(spec: Spec, traced: Traced, sensitivity: Mapping[str, float] | None) -> Iterator[Structure]:
    """All structures to try: 0, 1, 2, ... gated blocks, each with the final classifier and with the auxiliary exit.

    `traced` is the base network of `spec`. Blocks are gated in ascending order of their assigned ratios, as with an
    increasing d_th. Budgets are divided among sites by `sensitivity`, or by size if it is None.
    """
    base, sites = traced.module, traced.sites
    eta = sensitivity or {site.name: float(site.relus) for site in sites}
    last = {site.name for site in sites if site.stage == sites[-1].stage}
    staged = len(last) < len(sites)
    for gated in _gatings(traced, allocate(sites, eta, max(1, sum(s.relus for s in sites) // 10))):
        yield Structure(spec, gated, False, sites, eta, _cut(spec, base, gated, None))
        # A block after the exit is removed with it, so gating that block would not make a different network.
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
    """The largest budget of `body` that meets `target`, with its forecast; or, if none does, the cost of budget 1.

    The cost is in the target's unit. The budget is exact to the relative precision `FINE`. The search assumes that the
    cost rises with the budget. It can fall slightly, because signs are computed in words of 64 bits, so the result may
    be a few ReLUs below the largest possible budget.
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


@dataclass(frozen=True, eq=False)
class Original:
    """The unreduced network that candidates are cut from.

    `network` is the module of `spec`. `sensitivity` maps ReLU sites to weights by which a budget is divided; without
    it, sites are weighted by size.
    """

    spec: Spec
    network: nn.Module
    sensitivity: Mapping[str, float] | None = None


def plan(
    original: Original,
    target: Target,
    *,
    machine: Machine | None = None,
    reshapes: Sequence[tuple[float, float]] = (),
    say: Callable[[str], None] = lambda text: None,
) -> list[Candidate]:
    """Networks that meet `target`, in ascending order of `points_lost`.

    Only Pareto-optimal ones: no other candidate has at least as many ReLUs, MACs and layers and more of one of them.
    `reshapes` are further (width, resolution) factors to try; they need a network of the zoo, and each needs a teacher
    of its own. `say` is called with a line of text for each structure that is tried. Raises ShoalError when no network
    meets the target; the error states the smallest cost that was found.
    """
    spec = original.spec
    whole = Traced(original.network, spec.shape)
    everything = sum(site.relus for site in whole.sites)
    found, least = list[Candidate](), math.inf
    for width, resolution in ((1.0, 1.0), *reshapes):
        shaped = replace(spec, width=spec.width * width, resolution=spec.resolution * resolution)
        if shaped == spec:
            traced, eta = whole, original.sensitivity
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
    lost = points_lost(found.relus / everything, len(body.gated), body.exit, width, resolution)
    return Candidate(budget, body.gated, "auxiliary" if body.exit else "final", width, resolution, found, lost)


def _undominated(found: Sequence[Candidate]) -> list[Candidate]:
    # More ReLUs, MACs and layers count as better here: all candidates meet the target.
    best = sorted(front([(-c.forecast.relus, -c.forecast.macs, -c.forecast.depth) for c in found], ties=True))
    worth = min(c.lost for c in found) + WORTH
    return sorted((found[i] for i in best if found[i].lost <= worth), key=lambda c: (c.lost, -c.forecast.relus))
