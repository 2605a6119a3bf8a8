"""The commands of private inference: artifacts, certificates, and both parties. `cli` gives them their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal import deployment, serving
from shoal.errors import ShoalError
from shoal.options import DataDir, Json, pairs, show

Cert = Annotated[Path | None, typer.Option(help="This party's certificate (PEM).")]
Key = Annotated[Path | None, typer.Option(help="This party's private key (PEM).")]
Ca = Annotated[Path | None, typer.Option(help="The certificate authority that signed the peer's certificate.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Plain TCP; only on loopback.")]
Connect = Annotated[str, typer.Option(help="The server's host:port.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for the peer in any step.")]
ClientAddress = Annotated[
    str | None, typer.Option(help="host:port at which the server reaches this machine for SPU's own connection.")
]
ClientPool = Annotated[Path | None, typer.Option(help="Where prepared items are kept; beside the artifact.")]


def compile_(
    run: Annotated[Path, typer.Argument(help="A run folder of train, reduce or demo.")],
    out: Annotated[Path, typer.Option(help="The artifact: writes client/ and server/.")],
    data_dir: DataDir = None,
    fraction_bits: Annotated[int | None, typer.Option(help="Fixed-point fraction bits; chosen if left out.")] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="Compile the network that the run started from.")] = False,
    max_failure: Annotated[
        float, typer.Option(help="Most chance of a failed local truncation in one inference; less costs exchanges.")
    ] = 2.0**-20,
    ot_kind: Annotated[
        str, typer.Option(help="Oblivious transfers: YACL_Ferret (few bytes) or YACL_Softspoken (starts in a second).")
    ] = "YACL_Ferret",
    json: Json = False,
) -> None:
    """Fold, calibrate and compile a network; client/ holds no weight, server/ holds them."""
    body = deployment.compile_run(run, out, data_dir, teacher, fraction_bits, max_failure, ot_kind)
    show(body, json, lambda: pairs(str(out), body))


def certs(
    folder: Annotated[Path, typer.Argument(help="Where to write ca.pem, server.pem/.key, client.pem/.key.")],
    name: Annotated[list[str] | None, typer.Option(help="Host name or address of a party; repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the certificates in that folder.")] = False,
    json: Json = False,
) -> None:
    """Make test certificates for mutual TLS. In production use your own authority's."""
    body = deployment.certs(folder, name or ["localhost", "127.0.0.1"], overwrite)
    show(body, json, lambda: pairs("certificates", body))


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
    operation = serving.Operation(sessions, grace, metrics, metrics_port, ready_file, json, threads)
    serving.serve(artifact, listen, deployment.tls(cert, key, ca), operation, choices)


def prepare(
    artifact: Annotated[Path, typer.Argument(help="The client/ half of an artifact.")],
    count: Annotated[int, typer.Option(help="Items to make: each serves one image, once.")] = 1,
    batch: Annotated[int, typer.Option(help="Items made together; more share SPU's packing and take more memory.")] = 1,
    keep: Annotated[
        int | None, typer.Option(help="Stay, and make items whenever fewer than this are ready; until stopped.")
    ] = None,
    connect: Connect = "127.0.0.1:7766",
    cert: Cert = None,
    key: Key = None,
    ca: Ca = None,
    insecure: Insecure = False,
    timeout: Timeout = 120.0,
    client_address: ClientAddress = None,
    pool: ClientPool = None,
    json: Json = False,
) -> None:
    """Make randomness with the server, ahead of time, for queries that are then mostly waiting for messages.

    What is finished stays if this is stopped; run it again for the rest. With --keep, failures are logged and tried
    again, and queries from the same pool get their turn between batches.
    """
    tls = deployment.tls(cert, key, ca)
    connection = deployment.Connection(connect, tls, insecure, timeout, client_address, pool)
    if keep is not None and count != 1:
        raise ShoalError(f"found --count {count} and --keep {keep}; need one of them; leave out --count to stay")
    if keep is not None:
        serving.keep(artifact, connection, keep, batch, json)
        return
    body = deployment.prepare(artifact, connection, count, batch)
    show(body, json, lambda: pairs("prepared", body))


def query(
    artifact: Annotated[Path, typer.Argument(help="The client/ half of an artifact.")],
    images: Annotated[list[Path], typer.Argument(help="Image files; resized to nothing: their size must fit.")],
    mode: Annotated[str, typer.Option(help="prepared (spends what shoal prepare made) or direct.")] = "prepared",
    top_up: Annotated[bool, typer.Option("--top-up", help="Make the items that are missing first.")] = False,
    exit_above: Annotated[
        float | None, typer.Option(help="Leave at the first exit that is as sure (0 to 1); the server must allow it.")
    ] = None,
    connect: Connect = "127.0.0.1:7766",
    cert: Cert = None,
    key: Key = None,
    ca: Ca = None,
    insecure: Insecure = False,
    timeout: Timeout = 120.0,
    client_address: ClientAddress = None,
    pool: ClientPool = None,
    json: Json = False,
) -> None:
    """Run the client's side: ask the server to classify images that it never sees."""
    tls = deployment.tls(cert, key, ca)
    connection = deployment.Connection(connect, tls, insecure, timeout, client_address, pool)
    body = deployment.query(artifact, images, connection, mode, top_up, exit_above)
    show(body, json, lambda: deployment.query_table(body))
