"""The commands of private inference: artifacts, certificates, and both parties. `cli` gives them their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.options import DataDir, Json, pairs, show
from shoal.errors import ShoalError
from shoal.jobs import query as job
from shoal.jobs.serve import keep as keep_ready

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
    body = job.compile_run(run, out, data_dir, teacher, fraction_bits, max_failure, ot_kind)
    show(body, json, lambda: pairs(str(out), body))


def certs(
    folder: Annotated[Path, typer.Argument(help="Where to write ca.pem, server.pem/.key, client.pem/.key.")],
    name: Annotated[list[str] | None, typer.Option(help="Host name or address of a party; repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the certificates in that folder.")] = False,
    json: Json = False,
) -> None:
    """Make test certificates for mutual TLS. In production use your own authority's."""
    body = job.certs(folder, name or ["localhost", "127.0.0.1"], overwrite)
    show(body, json, lambda: pairs("certificates", body))


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
    tls = job.tls(cert, key, ca)
    connection = job.Connection(connect, tls, insecure, timeout, client_address, pool)
    if keep is not None and count != 1:
        raise ShoalError(f"found --count {count} and --keep {keep}; need one of them; leave out --count to stay")
    if keep is not None:
        keep_ready(artifact, connection, keep, batch, json)
        return
    body = job.prepare(artifact, connection, count, batch)
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
    tls = job.tls(cert, key, ca)
    connection = job.Connection(connect, tls, insecure, timeout, client_address, pool)
    body = job.query(artifact, images, connection, mode, top_up, exit_above)
    show(body, json, lambda: job.query_table(body))
