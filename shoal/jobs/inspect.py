"""What `shoal check` finds: what a network costs, where it could be shallower, and what of it cannot run in private."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from torch import nn

from shoal.commands import input_shape
from shoal.cost import cost
from shoal.equivalence import check_trace
from shoal.figures import counts
from shoal.fold import fold
from shoal.private.cost_model import plan_of
from shoal.private.refusal import refusals
from shoal.run import own_network
from shoal.sites import find_blocks
from shoal.spec import Spec
from shoal.surgery import trace


def check(
    model: str, size: str | None, classes: int, width: float, resolution: float, replaced: Sequence[str]
) -> dict[str, Any]:
    """`examine` a zoo's or a user's network by name, its layers `replaced` first (``relu6=relu``)."""
    shape = input_shape(size, model)
    return examine(own_network(Spec(model, classes, shape, width, resolution, replaced=tuple(replaced))), shape)


def examine(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Counts, replaceable blocks and refusals of `model` for images of `shape` ([C, H, W]), ready for JSON.

    ``online`` is what one prepared inference exchanges, with signs of 18 bits, or None where something is refused.
    Raises ShoalError when the model cannot be traced, fails on such images, or computes something else once traced.
    """
    check_trace(model, shape)
    graph = trace(model, shape)
    folded = fold(graph)
    refused = refusals(folded)
    body: dict[str, Any] = {**counts(cost(graph)), "blocks": [block.name for block in find_blocks(model, shape)]}
    body |= {"private": not refused, "refused": [asdict(refusal) for refusal in refused]}
    return body | {"online": None if refused else asdict(plan_of(folded).online)}


def summary(name: str, body: dict[str, Any]) -> Group:
    """What `examine` found, for people: the counts, then what is refused and what to do instead."""
    table = Table(title=escape(name), header_style="bold", show_header=False)
    rows = {k: f"{body[k]:,}" for k in ("relus", "comparisons", "macs", "linear_macs", "depth", "params")}
    rows |= {"blocks to gate": f"{len(body['blocks'])}", "runs in private": "yes" if body["private"] else "no"}
    if body["online"]:
        rows |= {
            "bytes online": f"{body['online']['bytes']:,}",
            "one-way latencies": f"{body['online']['latencies']:,}",
        }
    for label, value in rows.items():
        table.add_row(label, value)
    return Group(table, *([_refused(body["refused"])] if body["refused"] else []))


def _refused(rows: list[dict[str, str]]) -> Table:
    table = Table(title="cannot run in private", header_style="bold")
    for head in ("node", "found", "need"):
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(escape(row[key]) for key in ("node", "found", "need")))
    return table
