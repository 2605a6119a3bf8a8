"""The command of the server's side. `app` gives it its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.query import Ca, Cert, Insecure, Key, Timeout
from shoal.jobs import serve as job
from shoal.jobs.query import tls


def serve(
    artifact: Annotated[Path, typer.Argument(help="The server/ half of an artifact.")],
    listen: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:7766",
    cert: Cert = None,
    key: Key = None,
    ca: Ca = None,
    insecure: Insecure = False,
    sessions: Annotated[int | None, typer.Option(help="Stop after so many sessions.")] = None,
    timeout: Timeout = 120.0,
    pool: Annotated[Path | None, typer.Option(help="Where prepared items are kept; beside the artifact.")] = None,
    pool_gib: Annotated[float, typer.Option(help="GiB of prepared items that each client may have here.")] = 4.0,
    max_pools: Annotated[int, typer.Option(help="Pools that each certificate may have here.")] = 64,
    max_clients: Annotated[int, typer.Option(help="Sessions at once; more are refused.")] = 8,
    engines: Annotated[int, typer.Option(help="SPU processes at once (direct queries, preparation).")] = 1,
    early_exit: Annotated[
        bool, typer.Option("--early-exit", help="Let clients end at an exit; the server learns which was taken.")
    ] = False,
    link_port: Annotated[int | None, typer.Option(help="Port of SPU's own connection; a free one.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of a query's plain products; half of the cores.")] = None,
    grace: Annotated[
        float, typer.Option(help="Seconds for queries in progress after SIGTERM or Ctrl-C; a second one ends at once.")
    ] = 5.0,
    metrics: Annotated[Path | None, typer.Option(help="Write figures here as JSON, every 5 seconds.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Show figures to Prometheus at 127.0.0.1:PORT/metrics; 0 takes a free one.")
    ] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Write the address here once listening.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Log as JSON lines.")] = False,
) -> None:
    """Run the server's side: it holds the weights and learns nothing of the images but their number.

    It serves prepared queries, their preparation, and direct queries alike: the client chooses.
    """
    choices = {"insecure": insecure, "timeout_s": timeout, "pool": pool, "pool_bytes": int(pool_gib * 2**30)}
    choices |= {"max_clients": max_clients, "engines": engines, "link_port": link_port, "early_exit": early_exit}
    choices["max_pools"] = max_pools
    operation = job.Operation(sessions, grace, metrics, metrics_port, ready_file, json, threads)
    job.serve(artifact, listen, tls(cert, key, ca), operation, choices)
