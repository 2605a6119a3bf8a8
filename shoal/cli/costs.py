"""The commands that measure and forecast private inference. `app` gives them their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal import units
from shoal.cli.fields import expanded
from shoal.cli.options import Json, grid, pairs, show
from shoal.costs.links import LINKS
from shoal.jobs import costs as job
from shoal.measuring import bench as measuring
from shoal.report.layout import Grid


def bench(
    artifact: Annotated[Path, typer.Argument(help="An artifact with both halves.")],
    link: Annotated[
        list[str] | None, typer.Option("--link", "--network", help="none, lan or wan (repeatable); all unless given.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Number of queries; the median is shown.")] = 5,
    batch: Annotated[int, typer.Option(help="Number of items prepared together.")] = 1,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Prepare no items: exchange random words, which take as long; no logits."),
    ] = False,
    run: Annotated[
        Path | None, typer.Option(help="The run that was compiled: also write the figures into its summary.")
    ] = None,
    json: Json = False,
) -> None:
    """Time prepared queries between two processes on this machine, over a relay that acts like a LAN or a WAN."""
    body = measuring.bench(artifact, link or list(LINKS), rounds, batch, rehearse)
    if run is not None:
        measuring.record(run, artifact, body)
    show(body, json, lambda: bench_table(body))


def bench_table(body: measuring.Bench) -> Grid:
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
    """Measure how long products, ReLUs and exchanges take on this machine, which must be idle, in 1.5 minutes."""
    body = job.calibrate(out)
    show(body, json, lambda: pairs("constants of this machine", body))


@expanded
def cost(request: job.Request, json: Json = False) -> None:
    """Forecast a private inference before compiling: direct, offline and online, on this machine, a LAN and a WAN.

    Without --machine, the constants are those of two cores that both parties share. Bytes and exchanges are exact,
    except for the width of the signs, which compile determines.
    """
    body = job.forecast(request)
    counts = f"{units.count(body['relus'])} ReLUs, {units.count(body['macs'])} MACs, depth {body['depth']}"
    show(body, json, lambda: grid(f"{request.target}: {counts}", job.HEAD, job.table_rows(body), texts=(0, 1)))
