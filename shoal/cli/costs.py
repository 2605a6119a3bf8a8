"""`shoal bench`, `shoal calibrate` and `shoal cost`: measure and forecast private inference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal import units
from shoal.cli.fields import expanded
from shoal.cli.options import Json, grid, pairs, show
from shoal.jobs import costs as job
from shoal.measuring import bench as measuring
from shoal.report.layout import Grid


@expanded
def bench(
    artifact: Annotated[Path, typer.Argument(help="An artifact of shoal compile, with client/ and server/.")],
    request: measuring.Request,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Also write the figures into the summary of this run folder, from which the artifact was compiled."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Time prepared queries over a simulated LAN or WAN, between two processes on this machine.

    lan is 3 Gbit/s with a round trip of 0.3 ms, wan 400 Mbit/s with 40 ms, and none adds no delay.
    """
    body = measuring.bench(artifact, request)
    if run is not None:
        measuring.record(run, artifact, body)
    show(body, json, lambda: bench_table(body))


def bench_table(body: measuring.Bench) -> Grid:
    """A table with a row for each link: median seconds and their parts, fastest, slowest, MB, messages, latencies."""
    head = ["link", "online, s", "of which link, s", "rest, s", "fastest, s", "slowest, s"]
    head += ["MB", "messages", "one-way latencies"]
    rows = []
    for name, row in body["networks"].items():
        times = [units.seconds(row[k]) for k in ("online_s", "link_s", "rest_s", "fastest_s", "slowest_s")]
        sent = [units.megabytes(row["bytes"]), units.count(row["messages"]), units.count(row["latencies"])]
        rows.append([name, *times, *sent])
    offline = body["offline_s"]
    made = "rehearsal items" if offline is None else f"{units.seconds(offline)} s offline for each item"
    caption = f"{REST}\nLoad average at the end: {body['load']:.1f} on {body['cores']} cores."
    return grid(f"prepared queries, medians of {body['rounds']}; {made}", head, rows, caption=caption)


REST = (
    "Link: bytes and one-way latencies (with the request for an item) at the rate and round trip that the relay "
    "achieved.\n"
    "Rest: computation of both parties, TLS, and the relay. All of them share this machine's cores. Two machines have "
    "no relay, so shoal cost leaves it out; a busy machine makes the rest longer than its forecast, too."
)


@expanded
def calibrate(wanted: job.Calibration, json: Json = False) -> None:
    """Measure the speed of this machine for forecasts: seconds of products, ANDs, ReLUs and exchanges.

    It takes about two minutes. Nothing else should run on the machine meanwhile. What varies widely is measured again.
    If it still varies, a warning says that the machine is busy.
    """
    body = job.calibrate(wanted)
    show(body, json, lambda: pairs("constants of this machine", body))


@expanded
def cost(request: job.Request, json: Json = False) -> None:
    """Forecast a private inference before compiling: seconds and bytes on this machine, over a LAN and over a WAN.

    Offline is the preparation of one item, which a query spends; online is the query. Without --machine, the forecast
    is for a machine with two cores that both parties share. The online numbers of bytes and latencies are exact, except
    that compile may choose another number of bits for the signs in ReLUs. The offline ones leave out the keys that SPU
    makes once for a session (about 19 MB).
    """
    body = job.forecast(request)
    counts = f"{units.count(body['relus'])} ReLUs, {units.count(body['macs'])} MACs, depth {body['depth']}"
    show(body, json, lambda: grid(f"{request.target}: {counts}", job.HEAD, job.table_rows(body), texts=(0, 1)))
