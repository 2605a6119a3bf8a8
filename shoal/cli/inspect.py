"""`shoal count`, `shoal check` and `shoal evaluate`: inspect a network."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from shoal.cli.fields import expanded
from shoal.cli.options import Json, pairs, show
from shoal.jobs import inspect as job
from shoal.jobs.options import Named


@expanded
def count(
    named: Named,
    design: Annotated[
        str | None,
        typer.Option(
            help="Count this DeepReDuce design of the network, named by the stages that keep ReLUs, such as "
            "S2RT+S3-a0.5-r0.5, or Conv1 or NoReLUs."
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="List every layer, with its parameters, MACs and ReLUs.")
    ] = False,
    json: Json = False,
) -> None:
    """Count ReLUs, MACs, conv depth and parameters, and list every ReLU site.

    MACs are the multiply-adds of convolutions, including 1x1 shortcuts; depth is the number of convolutions on the
    longest path. A ReLU site is a layer of ReLUs.

    In a --design, S3 is a stage that keeps its ReLUs, and S2RT one that keeps every other ReLU layer; -a0.5 means half
    the channels, -r0.5 half the resolution, and -one one block per stage. Conv1 keeps the ReLUs of the first layer (the
    stem) only, and NoReLUs none. A design is also counted with merged linear layers: by folding, which is exact, and as
    in the paper.
    """
    body = job.count(named, design, layers=layers)
    table = job.layer_table if layers else job.count_table
    show(body, json, lambda: table(named.model, body))
    for name in body["unknown"]:
        Console(stderr=True).print(f"found {name} without a formula; its cost is missing from the totals")


@expanded
def check(named: Named, json: Json = False) -> None:
    """Show a network's costs, its replaceable blocks, and what cannot run in private.

    For each layer that cannot run in private, it shows what to use instead. Nothing is trained or compiled. The exit
    status is 1 when something cannot run in private.
    """
    body = job.check(named)
    show(body, json, lambda: job.summary(named.model, body))
    if not body["private"]:
        raise typer.Exit(1)


@expanded
def evaluate(wanted: job.Evaluation, json: Json = False) -> None:
    """Show test accuracy and counts of a run's network."""
    body = job.evaluate(wanted)
    show(body, json, lambda: pairs(str(wanted.run), body))
