"""`shoal serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.fields import expanded
from shoal.jobs import serve as job
from shoal.jobs.query import Certificates
from shoal.jobs.serve import Operation
from shoal.private.serving.options import ADDRESS, ServerOptions


@expanded
def serve(
    artifact: Annotated[Path, typer.Argument(help="The server/ half of an artifact that shoal compile wrote.")],
    *,
    listen: Annotated[str, typer.Option(help="host:port to listen on; port 0 means a free port.")] = ADDRESS,
    certificates: Certificates,
    options: ServerOptions,
    operation: Operation,
) -> None:
    """Run the server of private inference, which holds the weights.

    The server learns how many images a client sends, but neither the images nor the answers. It answers queries and,
    together with each client, makes the items that queries use up (shoal prepare). Clients need a certificate signed
    by the authority of --ca.

    Example: shoal serve artifact/server --cert certs/server.pem --key certs/server.key --ca certs/ca.pem
    """
    job.serve(artifact, listen, certificates.tls(), options, operation)
