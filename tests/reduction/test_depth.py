"""Which blocks to gate under a limit: the dynamic programme against brute force, and real networks' prices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shoal.costs.model import layout_of, prepared_cost
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.graph import Graph
from shoal.models import build
from shoal.recipes import shallow
from shoal.recipes.shallow.options import PRICES
from shoal.recipes.shallow.presets import quick
from shoal.reduction.depth import Candidate, choose, choose_blocks, gated_graph, importances
from shoal.surgery.sites import find_blocks
from shoal.surgery.traced import Traced
from tests.conftest import Residual
from tests.support.tables import fast_first

SHAPE = (1, 8, 8)
whole_numbers = st.integers(-3, 9)


def macs(graph: Graph) -> float:
    return float(cost(graph).macs)


def brute_force(blocks: Sequence[Candidate], saving: float) -> tuple[float, float] | None:
    """(importance, saving) of the best subset, by trying all."""
    best = None
    for chosen in itertools.product((False, True), repeat=len(blocks)):
        clash = any(b.overlaps and chosen[i] and chosen[i - 1] for i, b in enumerate(blocks) if i)
        picked = [b for b, c in zip(blocks, chosen, strict=True) if c]
        saved, lost = sum(b.saving for b in picked), sum(b.importance for b in picked)
        if not clash and saved >= saving and (best is None or (lost, -saved) < (best[0], -best[1])):
            best = (lost, saved)
    return best


@given(st.lists(st.tuples(whole_numbers, whole_numbers, st.booleans()), max_size=9), st.integers(-2, 40))
@settings(max_examples=300)
def test_choose_is_as_good_as_brute_force(rows: list[tuple[int, int, bool]], saving: int) -> None:
    blocks = [Candidate(f"b{i}", float(a), float(s), o) for i, (a, s, o) in enumerate(rows)]
    best = brute_force(blocks, saving)
    if best is None:
        with pytest.raises(ShoalError, match=r"found that gating saves .* at most; need"):
            choose(blocks, saving)
        return
    picked = [b for b in blocks if b.name in choose(blocks, saving)]
    assert (sum(b.importance for b in picked), sum(b.saving for b in picked)) == best


@pytest.mark.slow
def test_a_limit_on_macs_is_kept_at_the_least_loss() -> None:
    traced = Traced(build("resnet10", 10, width=0.125, channels=1), (1, 16, 16))
    whole = macs(gated_graph(traced, ()))
    names = list(importances(traced, lambda m: 0.0))
    lost = dict(zip(names, (4.0, 1.0, 2.0, 3.0), strict=True))
    subsets = [s for n in range(5) for s in itertools.combinations(names, n)]
    prices = {s: macs(gated_graph(traced, s)) for s in subsets}
    for part in (0.9, 0.6):
        chosen = choose_blocks(traced, macs, part * whole, lost)
        fits = [s for s in subsets if prices[s] <= part * whole]
        assert chosen in fits
        assert sum(lost[n] for n in chosen) == min(sum(lost[n] for n in s) for s in fits)
    with pytest.raises(ShoalError, match="raise the limit"):
        choose_blocks(traced, macs, 0.1 * whole, lost)


def test_seconds_of_private_inference_are_a_price_too() -> None:
    traced = Traced(Residual().eval(), SHAPE)

    def seconds(graph: Graph) -> float:
        return prepared_cost(layout_of(graph)).online.seconds

    whole = seconds(gated_graph(traced, ()))
    lost = dict.fromkeys(importances(traced, lambda m: 0.0), 1.0)
    chosen = choose_blocks(traced, seconds, 0.95 * whole, lost)
    assert len(chosen) == 1
    assert seconds(gated_graph(traced, chosen)) <= 0.95 * whole


@pytest.mark.parametrize("price", fast_first(PRICES))
def test_a_reduction_takes_every_price(price: str) -> None:
    model = Residual().eval()
    given = {"budget": 100, "exit": False, "masks": "random", "gate_price": price}
    shallow.check_options(shallow.Options(**given, gate_limit=0.99), quick(), model, SHAPE)  # type: ignore[arg-type]
    with pytest.raises(ShoalError, match="raise the limit"):
        shallow.check_options(shallow.Options(**given, gate_limit=0.01), quick(), model, SHAPE)  # type: ignore[arg-type]
    with pytest.raises(ShoalError, match="found gate_price 'flops'"):
        shallow.check_options(shallow.Options(**given | {"gate_price": "flops"}), quick(), model, SHAPE)  # type: ignore[arg-type]


UNUSED = [
    ({"masks": "snl", "sensitivity": {"relu": 1.0}}, "found sensitivities with masks 'snl'"),
    ({"masks": "coordinate-descent", "granularity": "channel"}, "found granularity 'channel'"),
    ({"gates": False, "gated": (find_blocks(Residual(), SHAPE)[0].name,)}, "found blocks to gate"),
    ({"gate_price": "online"}, "found gate_price 'online'"),
    ({"masks": "autorep", "gate_price": "online", "gate_limit": 0.9}, "need masks without squares"),
]


@pytest.mark.parametrize(("more", "message"), UNUSED, ids=[message for _, message in UNUSED])
def test_options_without_an_effect_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        shallow.check_options(shallow.Options(**{"budget": 100, "exit": False} | more), quick(), Residual(), SHAPE)


def test_importance_is_what_the_score_loses_without_the_inner_relu() -> None:
    model = Residual().eval()
    x = torch.randn(4, *SHAPE)

    def score(network: nn.Module) -> float:
        return -float(network(x).detach().square().sum())

    found = importances(Traced(model, SHAPE), score)
    assert len(found) == 2
    for name, lost in found.items():
        graph_free = model_without(model, name)
        assert lost == pytest.approx(score(model) - score(graph_free), abs=1e-5)


def model_without(model: nn.Module, name: str) -> nn.Module:
    from shoal.reduction.dropping import drop_relus

    return drop_relus(model, [name])
