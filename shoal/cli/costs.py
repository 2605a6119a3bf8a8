"""The commands that measure and forecast private inference. `app` gives them their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoal import units
from shoal.cli.options import Json, grid, pairs, show
from shoal.costs.links import LINKS
from shoal.jobs import costs as job
from shoal.measuring import bench as measuring
from shoal.report.layout import Grid


def bench(
    artifact: Annotated[Path, typer.Argument(help="An artifact with both halves.")],
    link: Annotated[
        list[str] | None, typer.Option("--link", "--network", help="none, lan or wan; repeatable. All if left out.")
    ] = None,
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
    body = measuring.bench(artifact, link or list(LINKS), rounds, batch, rehearse)
    if run is not None:
        measuring.record(run, artifact, body)
    show(body, json, lambda: bench_table(body))


def bench_table(body: dict[str, Any]) -> Grid:
    """A row for each network: median seconds with the fastest and slowest query, MB, messages, latencies."""
    head = ["network", "online, s", "fastest, s", "slowest, s", "MB", "messages", "one-way latencies"]
    rows = []
    for name, row in body["networks"].items():
        times = [units.seconds(row[k]) for k in ("online_s", "fastest_s", "slowest_s")]
        sent = [units.megabytes(row["bytes"]), units.count(row["messages"]), units.count(row["latencies"])]
        rows.append([name, *times, *sent])
    offline = body["offline_s"]
    made = "rehearsal items" if offline is None else f"{units.seconds(offline)} s offline for each item"
    return grid(f"prepared queries, medians of {body['rounds']}; {made}", head, rows)


def calibrate(
    out: Annotated[Path, typer.Option(help="Where to write the constants, for shoal cost --machine.")] = Path(
        "machine.json"
    ),
    json: Json = False,
) -> None:
    """Measure what products, ReLUs and exchanges take on this machine, idle: 1.5 minutes, two processes, SPU."""
    body = job.calibrate(out)
    show(body, json, lambda: pairs("constants of this machine", body))


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
    graph = job.network_of(target, input, classes, width, resolution)
    body = job.forecast(graph, job.machine_at(machine), batch)
    title = f"{target}: {units.count(body['relus'])} ReLUs, {units.count(body['macs'])} MACs, depth {body['depth']}"
    show(body, json, lambda: grid(title, job.HEAD, job.table_rows(body), texts=(0, 1)))
