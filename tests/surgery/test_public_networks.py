"""Laws over specimens of public networks: each is counted and trained, and runs in private or is refused by name.

The table in docs/your_network.md is the one that `families.FAMILIES` gives.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.private.compiler.compilation import compile
from shoal.private.compiler.refusal import INSTEAD, OTHER, refusals
from shoal.private.program.clear import run_clear
from shoal.surgery.normal_form import normalise
from shoal.surgery.tracing import check_trace
from tests.conftest import randomise
from tests.surgery.families import FAMILIES
from tests.surgery.public import IMAGE

PAGE = Path(__file__).parents[2] / "docs" / "your_network.md"
HEAD = ["| family | tried | counted | trained | runs in private |", "| --- | --- | --- | --- | --- |"]


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_counted_trained_and_run_in_private_or_refused_by_name(name: str) -> None:
    torch.manual_seed(5)
    model, x = randomise(FAMILIES[name].make().eval()), torch.randn(3, *IMAGE)
    wanted = model(x).detach()
    graph = check_trace(model, IMAGE)
    assert cost(graph).macs > 0
    network = normalise(model, IMAGE)
    assert (network(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    network.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    found = refusals(fold(graph))
    assert [r.found.split()[0] for r in found[:1]] == ([FAMILIES[name].refused] if FAMILIES[name].refused else [])
    assert all(r.need != OTHER for r in found)
    if not found:
        program, weights = compile(fold(graph), x)
        gap = np.abs(run_clear(program, weights, x)[0] - wanted.numpy()).max()
        assert gap <= program.error_bound + 1e-5 * float(wanted.abs().max())


def table() -> list[str]:
    """The rows of the table in docs/your_network.md."""
    rows = [
        f"| {name} | {family.idiom} | yes | yes | {'no: ' + family.refused if family.refused else 'yes'} |"
        for name, family in FAMILIES.items()
    ]
    return [*HEAD, *rows]


def test_the_page_has_this_table() -> None:
    assert "\n".join(table()) in PAGE.read_text()


def test_each_refusal_in_the_table_has_advice() -> None:
    assert OTHER not in INSTEAD.values()
