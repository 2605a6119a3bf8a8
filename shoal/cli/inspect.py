"""The commands that look at a network. `app` gives them their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoal.cli.fields import expanded
from shoal.cli.options import DataDir, Json, pairs, show
from shoal.jobs import inspect as job
from shoal.jobs.inputs import Named


@expanded
def count(
    named: Named,
    design: Annotated[
        str | None,
        typer.Option(help="A DeepReDuce design of it, named by the stages that keep ReLUs: S2RT+S3-a0.5-r0.5."),
    ] = None,
    json: Json = False,
) -> None:
    """Count ReLUs, MACs, conv depth and parameters, and list every ReLU site.

    MACs are those of convolutions, including 1x1 shortcuts; depth is the number of convolutions on the longest path.
    With --design, also convolutions and MACs after folding, which is exact, and merged as the paper counts. S2RT is a
    stage with every other ReLU layer; -a0.5 means half the channels, -r0.5 half the resolution, -one one block a stage.
    """
    body = job.count(named, design)
    show(body, json, lambda: job.count_table(named.model, body))
    for name in body["unknown"]:
        Console(stderr=True).print(f"found {name} without a formula; its cost is missing from the totals")


@expanded
def check(named: Named, json: Json = False) -> None:
    """Show what a network costs, which blocks could be replaced, and what cannot run in private inference.

    Names each layer that cannot run in private, and what to use instead. Nothing is trained or compiled. The exit
    status is 1 when something cannot run in private.
    """
    body = job.check(named)
    show(body, json, lambda: job.summary(named.model, body))
    if not body["private"]:
        raise typer.Exit(1)


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder of train, reduce or demo.")],
    data_dir: DataDir = None,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Also in fixed point, in the clear, on the whole test set.")
    ] = False,
    json: Json = False,
) -> None:
    """Show test accuracy and counts of a run's network; --fixed adds private inference's arithmetic, bit for bit."""
    body = job.evaluate(run, data_dir, fixed)
    show(body, json, lambda: pairs(str(run), body))
