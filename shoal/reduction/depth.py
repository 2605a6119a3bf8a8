"""Choosing the blocks to gate by dynamic programming: a cost below a limit with the least loss of importance.

The idea is that of LayerMerge (Kim et al., ICML'24), applied to gated blocks. It assumes that the importances and the
savings of single blocks add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shoal.errors import ShoalError
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.pareto import front
from shoal.reduction.gates import add_branches, commit_branches, named_blocks, set_gate
from shoal.reduction.masks import add_masks
from shoal.surgery.traced import Traced
from shoal.surgery.tracing import trace

Price = Callable[[Graph], float]
"""The cost of a folded graph in any unit, such as MACs or seconds of private inference."""
State = tuple[float, float, tuple[str, ...]]
"""(cost saved, importance lost, names of the chosen blocks)."""


@dataclass(frozen=True)
class Candidate:
    """A block that may be gated, named by its inner ReLU site.

    `importance` is the score lost by gating it, `saving` the cost saved. `overlaps` is true if it shares a convolution
    with the previous candidate, so that only one of the two can be gated.
    """

    name: str
    importance: float
    saving: float
    overlaps: bool = False


def choose(candidates: Sequence[Candidate], saving: float) -> tuple[str, ...]:
    """The blocks that together save at least `saving` and lose the least importance; in a tie, those that save most.

    Exact for any real numbers, also negative ones: after each block only the Pareto-optimal states are kept. Raises
    ShoalError when no choice saves enough.
    """
    free: list[State] = [(0.0, 0.0, ())]
    taken: list[State] = []
    for block in candidates:
        before = free if block.overlaps else free + taken
        added = [(s + block.saving, i + block.importance, (*names, block.name)) for s, i, names in before]
        free, taken = _front(free + taken), _front(added)
    enough = [state for state in free + taken if state[0] >= saving]
    if not enough:
        most = max(state[0] for state in free + taken)
        raise ShoalError(
            f"found that gating saves {most:,.6g} at most; need {saving:,.6g}; raise the limit or take another network"
        )
    return min(enough, key=lambda state: (state[1], -state[0]))[2]


def _front(states: Sequence[State]) -> list[State]:
    return [states[i] for i in front([(-saved, lost) for saved, lost, _ in states])]


def gated_graph(traced: Traced, names: Sequence[str], *, keep_skip: bool = True) -> Graph:
    """The folded graph of a network with each named block replaced by one convolution with random weights.

    Raises ShoalError for a name that is not that of a block, and for two blocks that share a convolution.
    """
    if not names:
        return fold(traced.graph)
    model = add_branches(traced.module, named_blocks(traced.blocks, names), keep_skip=keep_skip)
    set_gate(model, 1.0)
    return fold(trace(commit_branches(model), traced.shape))


def importances(traced: Traced, score: Callable[[nn.Module], float]) -> dict[str, float]:
    """For each block, the decrease of `score` when its inner ReLU is replaced by the identity.

    `score` rates a network, higher is better: for example accuracy on validation images, or minus the loss.
    """
    whole, sizes = score(traced.module), {site.name: site.shape for site in traced.sites}
    lost = {}
    for block in traced.blocks:
        linear = add_masks(traced.module, {block.name: torch.zeros(sizes[block.name], dtype=torch.bool)})
        lost[block.name] = whole - score(linear)
    return lost


def candidates(
    traced: Traced,
    price: Price,
    importance: Mapping[str, float],
    *,
    keep_skip: bool = True,
) -> tuple[Candidate, ...]:
    """Every replaceable block of a network, with its `importance` and the decrease of `price` by gating it alone."""
    whole, found, convs = price(gated_graph(traced, ())), [], set[str]()
    for block in traced.blocks:
        saving = whole - price(gated_graph(traced, (block.name,), keep_skip=keep_skip))
        found.append(Candidate(block.name, importance[block.name], saving, bool(convs & set(block.convs))))
        convs = set(block.convs)
    return tuple(found)


def choose_blocks(
    traced: Traced,
    price: Price,
    limit: float,
    importance: Mapping[str, float],
    *,
    keep_skip: bool = True,
) -> tuple[str, ...]:
    """The blocks to gate so that `price` is at most `limit` and the sum of their importances is smallest.

    The price of the resulting network is checked. If it is above the limit because the savings of single blocks do not
    add up, the search is repeated with a higher target. Raises ShoalError when the limit cannot be reached.
    """
    whole = price(gated_graph(traced, ()))
    table = candidates(traced, price, importance, keep_skip=keep_skip)
    target = whole - limit
    while True:
        names = choose(table, target)
        over = price(gated_graph(traced, names, keep_skip=keep_skip)) - limit
        if over <= 0:
            return names
        # Above the sum of their savings, so that the same blocks are not chosen again.
        promised = sum(block.saving for block in table if block.name in names)
        target = max(target + over, promised) + 1e-9 * abs(whole)
