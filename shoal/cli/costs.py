"""The commands that measure, forecast and plan private inference. `cli` gives them their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal import bench as measuring
from shoal import costing, planning, plans
from shoal.options import Json, grid, pairs, show
from shoal.progress import status
from shoal.target import Target


def bench(
    artifact: Annotated[Path, typer.Argument(help="An artifact with both halves.")],
    network: Annotated[list[str] | None, typer.Option(help="none, lan or wan; repeatable. All if left out.")] = None,
    rounds: Annotated[int, typer.Option(help="Queries whose median is shown.")] = 5,
    batch: Annotated[int, typer.Option(help="Items made together.")] = 1,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Make no items: random words, real seconds, no logits.")
    ] = False,
    run: Annotated[
        Path | None, typer.Option(help="The run that was compiled: write the figures into its summary, too.")
    ] = None,
    json: Json = False,
) -> None:
    """Time prepared queries between two processes here, over a relay that behaves like a LAN or a WAN."""
    body = measuring.bench(artifact, network or list(measuring.NETWORKS), rounds, batch, rehearse)
    if run is not None:
        measuring.record(run, artifact, body)
    head = ["network", "online, s", "bytes", "messages", "one-way latencies"]
    rows = [
        [name, f"{row['online_s']:.4f}", f"{row['bytes']:,}", f"{row['messages']:,}", str(row["latencies"])]
        for name, row in body["networks"].items()
    ]
    made = "rehearsed" if rehearse else f"{body['offline_s']:.2f} s an item offline"
    show(body, json, lambda: grid(f"prepared queries; {made}", head, rows))


def calibrate(
    out: Annotated[Path, typer.Option(help="Where to write the constants, for shoal cost --machine.")] = Path(
        "machine.json"
    ),
    json: Json = False,
) -> None:
    """Measure what products, ReLUs and exchanges take on this machine, idle: 1.5 minutes, two processes, SPU."""
    body = costing.calibrate(out)
    show(body, json, lambda: pairs(str(out), {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in body.items()}))


def cost(
    target: Annotated[str, typer.Argument(help="A run folder, a zoo name, or package.module:callable.")],
    machine: Annotated[Path | None, typer.Option(help="Constants that shoal calibrate wrote.")] = None,
    batch: Annotated[int, typer.Option(help="Items made together.")] = 1,
    input: Annotated[str, typer.Option(help="Image size of a named network, channels x height x width.")] = "3x32x32",
    classes: Annotated[int, typer.Option(help="Number of classes of a named network.")] = 10,
    width: Annotated[float, typer.Option(help="Channel multiplier of a zoo network.")] = 1.0,
    resolution: Annotated[float, typer.Option(help="1, 0.5 or 0.25: feature-map multiplier of a zoo network.")] = 1.0,
    json: Json = False,
) -> None:
    """Forecast a private inference, direct, offline and online, here and over a LAN and a WAN, before compiling.

    Without --machine the constants are those of two cores that both parties share. Bytes and exchanges are exact but
    for the signs' width, which compile finds out.
    """
    graph = costing.network_of(target, input, classes, width, resolution)
    body = costing.forecast(graph, costing.machine_at(machine), batch)
    title = f"{target}: {body['relus']:,} ReLUs, {body['macs']:,} MACs, depth {body['depth']}"
    show(body, json, lambda: grid(title, costing.HEAD, costing.table_rows(body)))


def plan(
    target: Annotated[str, typer.Argument(help="A run folder of train or reduce, a zoo name, or package.module:call.")],
    limit: Annotated[
        str, typer.Option("--target", help="The most that one inference may take: 0.5s, 120ms, 80MB, 50krelus.")
    ],
    network: Annotated[str, typer.Option(help="none, lan (3 Gbit/s, 0.3 ms) or wan (400 Mbit/s, 40 ms).")] = "none",
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

    Columns: thousands of ReLUs, millions of MACs and convolutions that are left; seconds, MB both ways and one-way
    waits of the mode; blocks gated; whether the auxiliary exit is kept; width x resolution where they are scaled.

    Every candidate has the most ReLUs that its structure can afford. They are ordered by what published networks lost
    when they were cut alike (points on CIFAR-100): an order, not a forecast for your data. Train one with
    shoal reduce TEACHER --plan FILE.
    """
    wanted = Target.parse(limit, mode, network)
    spec, base = planning.network_of(target, input, classes, width, resolution)
    constants = costing.machine_at(machine)
    with status() as say:
        body = planning.plan(target, spec, base, wanted, constants, sensitivity, reshape, say)
    if out is not None:
        plans.write(body, pick, out)
    show(body, json, lambda: grid(f"{target} within {wanted}", *planning.table(body)))
