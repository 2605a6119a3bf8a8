"""The command that plans a reduction. `app` gives it its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.options import Json, grid, show
from shoal.costs import plan as plans
from shoal.costs.target import Target
from shoal.jobs import plan as job
from shoal.jobs.costs import machine_at
from shoal.progress import status


def plan(
    target: Annotated[str, typer.Argument(help="A run folder of train or reduce, a zoo name, or package.module:call.")],
    limit: Annotated[
        str, typer.Option("--target", help="The most that one inference may take: 0.5s, 120ms, 80MB, 50krelus.")
    ],
    link: Annotated[
        str, typer.Option("--link", "--network", help="none, lan (3 Gbit/s, 0.3 ms) or wan (400 Mbit/s, 40 ms).")
    ] = "none",
    mode: Annotated[str, typer.Option(help="online, offline, total (both), or direct (all inside SPU).")] = "online",
    machine: Annotated[Path | None, typer.Option(help="Constants that shoal calibrate wrote.")] = None,
    sensitivity: Annotated[Path | None, typer.Option(help="JSON {site: value}, which shares budgets out.")] = None,
    reshape: Annotated[
        bool, typer.Option("--reshape", help="Also try half the channels, half the resolution, and both.")
    ] = False,
    pick: Annotated[int, typer.Option(help="The candidate that --out chooses.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the plan, for shoal reduce --plan.")] = None,
    input: Annotated[str, typer.Option(help="Image size of a named network, channels x height x width.")] = "3x32x32",
    classes: Annotated[int, typer.Option(help="Number of classes of a named network.")] = 10,
    width: Annotated[float, typer.Option(help="Channel multiplier of a zoo network.")] = 1.0,
    resolution: Annotated[float, typer.Option(help="1, 0.5 or 0.25: feature-map multiplier of a zoo network.")] = 1.0,
    json: Json = False,
) -> None:
    """Find networks that meet a target before training any: ReLU budgets, gated blocks, an exit, other shapes.

    Columns: ReLUs, MACs and convolutions on the longest path that are left; seconds, MB both ways and one-way
    latencies of the mode; blocks that become one convolution, and "exit" where the early exit is deployed; points of
    accuracy that published networks lost; width x resolution where they are scaled.

    Every candidate has the most ReLUs that its structure can afford. They are ordered by what published networks lost
    when they were cut alike (points on CIFAR-100): an order, not a forecast for your data. Train one with
    shoal reduce TEACHER --plan FILE.
    """
    wanted = Target.parse(limit, mode, link)
    spec, base = job.network_of(target, input, classes, width, resolution)
    constants = machine_at(machine)
    with status() as say:
        body = job.plan(target, spec, base, wanted, constants, sensitivity, reshape, say)
    if out is not None:
        plans.write(body, pick, out)
    show(body, json, lambda: grid(f"{target} within {wanted}", *job.table(body)))
