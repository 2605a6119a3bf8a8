"""`shoal compile`, `shoal certs`, `shoal prepare` and `shoal query`: private inference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.fields import expanded
from shoal.cli.options import Json, pairs, show
from shoal.errors import ShoalError
from shoal.jobs import query as job
from shoal.jobs.pool import pool as count_items
from shoal.jobs.query import Compilation, Connection, Preparation, Query
from shoal.jobs.serve import keep
from shoal.private.serving.options import ClientOptions

Artifact = Annotated[Path, typer.Argument(help="The client/ half of an artifact that shoal compile wrote.")]


@expanded
def compile_(
    run: Annotated[Path, typer.Argument(help="A run folder, such as one of train, reduce or demo.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it gets client/ and server/.")],
    chosen: Compilation,
    json: Json = False,
) -> None:
    """Compile a run's network for private inference.

    It merges batch norms into the layers, chooses the fixed-point numbers with training images, and writes an artifact
    of two halves: client/ describes the network and holds no weights, server/ also holds the weights. Give each party
    its half. A network with an operation that cannot run in private is refused, with the name of the operation.

    Example: shoal compile runs/reduced --out artifact
    """
    body = job.compile_run(run, out, chosen)
    show(body, json, lambda: pairs(str(out), body))


def certs(
    folder: Annotated[Path, typer.Argument(help="Folder for ca.pem, server.pem, server.key, client.pem, client.key.")],
    name: Annotated[
        list[str] | None,
        typer.Option(help="Host name or IP address of a party (repeatable); localhost and 127.0.0.1 if left out."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing certificates.")] = False,
    json: Json = False,
) -> None:
    """Make test certificates for mutual TLS between the two parties.

    The certificates are valid for 30 days. The authority's own key is not written, so it cannot sign further
    certificates. In production, use certificates of your own authority.

    Example: shoal certs certs --name server.example --name client.example
    """
    body = job.certs(folder, name or ["localhost", "127.0.0.1"], overwrite)
    show(body, json, lambda: pairs("certificates", body))


@expanded
def prepare(
    artifact: Artifact, wanted: Preparation, connection: Connection, options: ClientOptions, json: Json = False
) -> None:
    """Make random items with the server, before queries (the offline phase).

    An item is random data for one inference, made so that the two parties' halves fit together. A query uses up one
    item for each image. Each party stores its half of the items in a pool on disk. Making an item takes far longer than
    the query that uses it.

    Finished items stay when this command is interrupted; run it again for the rest. With --keep, it runs as a
    service: it logs errors and tries again, and queries from the same pool run between two batches.

    Example: shoal prepare artifact/client --count 10 --cert certs/client.pem --key certs/client.key --ca certs/ca.pem
    """
    if wanted.keep is None:
        body = job.prepare(artifact, wanted, connection, options)
        show(body, json, lambda: pairs("prepared", body))
    elif wanted.count != 1:
        raise ShoalError(
            f"found --count {wanted.count} and --keep {wanted.keep}; need one of them; leave out --count to keep "
            "running"
        )
    else:
        keep(artifact, wanted.keep, wanted.batch, connection, options, json)


def pool(
    artifact: Annotated[Path, typer.Argument(help="The client/ or the server/ half of an artifact.")],
    pool: Annotated[
        Path | None,
        typer.Option(help="Folder of the prepared items; the folder `pool` next to the artifact if left out."),
    ] = None,
    json: Json = False,
) -> None:
    """Show how many prepared items are left, without connecting.

    One item serves one query of one image. At the server, the items of each client are counted, and the queries
    that each certificate has spent of its budget (serve --query-budget). A failure may leave an
    item at one party only; the two parties delete such items when they next connect.

    Example: shoal pool artifact/client
    """
    body = count_items(artifact, pool)
    shown = {key: value for key, value in body.items() if key not in ("clients", "spent")}
    shown |= {f"items ready of client {name}": items for name, items in body.get("clients", {}).items()}
    shown |= {f"queries spent by certificate {name}": count for name, count in body.get("spent", {}).items()}
    show(body, json, lambda: pairs(str(artifact), shown))


@expanded
def query(artifact: Artifact, asked: Query, connection: Connection, options: ClientOptions, json: Json = False) -> None:
    """Classify images privately: the client's side of an inference (the online phase).

    The server computes on secret shares of the images (each share alone is random) and learns neither the images nor
    the answers. The client learns the classes and logits but not the weights. Prepare one item for each image first
    (shoal prepare): if none is ready, the command makes the missing ones itself, which takes much longer than a query.

    Example: shoal query artifact/client IMAGE.png --cert certs/client.pem --key certs/client.key --ca certs/ca.pem
    """
    body = job.query(artifact, asked, connection, options)
    show(body, json, lambda: job.query_table(body))
