"""Depth by dynamic programming: the blocks to gate under a limit of any cost, at the least loss.

LayerMerge's idea (Kim et al., ICML'24), on gated blocks: importances and savings of single blocks add up.
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
"""What a folded graph costs: MACs, or seconds of private inference."""
State = tuple[float, float, tuple[str, ...]]
"""Saved, importance lost, blocks chosen."""


@dataclass(frozen=True)
class Candidate:
    """A block that may be gated, by its inner ReLU site.

    `importance` is what accuracy loses by it, `saving` what its price falls by; `overlaps` says that it shares a
    convolution with the candidate before it, so that both together cannot be gated.
    """

    name: str
    importance: float
    saving: float
    overlaps: bool = False


def choose(candidates: Sequence[Candidate], saving: float) -> tuple[str, ...]:
    """The blocks that save at least `saving` in all and lose the least importance; of equal ones those that save most.

    Exact for any real numbers, negative ones too: after each block only those states are kept that no other beats in
    both. Raises ShoalError when all of them together save too little.
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
    """The folded graph of a network with the named blocks replaced by one convolution each, of random weights.

    Raises ShoalError for a name that is no block, and for two blocks that share a convolution.
    """
    if not names:
        return fold(traced.graph)
    model = add_branches(traced.module, named_blocks(traced.blocks, names), keep_skip=keep_skip)
    set_gate(model, 1.0)
    return fold(trace(commit_branches(model), traced.shape))


def importances(traced: Traced, score: Callable[[nn.Module], float]) -> dict[str, float]:
    """What `score` (accuracy on validation images, minus the loss) loses when a block's inner ReLU is the identity."""
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
    """Every replaceable block of a network with what gating it alone saves of `price`."""
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
    """The blocks to gate so that `price` is at most `limit`, by the sum of their importances at the least loss.

    The limit holds for the price of the network that results. Where that price is higher than the savings of single
    blocks promise, the search goes on with a higher target. Raises ShoalError when the limit cannot be kept.
    """
    whole = price(gated_graph(traced, ()))
    table = candidates(traced, price, importance, keep_skip=keep_skip)
    target = whole - limit
    while True:
        names = choose(table, target)
        over = price(gated_graph(traced, names, keep_skip=keep_skip)) - limit
        if over <= 0:
            return names
        # More than these promised, so that they are not chosen again.
        promised = sum(block.saving for block in table if block.name in names)
        target = max(target + over, promised) + 1e-9 * abs(whole)
