"""Run a server as a separate process on this machine, with mutual TLS, for the demo and for measurements."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal.errors import ShoalError
from shoal.private.transport.certs import TLS


def served(
    artifact: Path, certificates: Path, sessions: int, pool: Path | None = None, flags: Sequence[str] = ()
) -> tuple[subprocess.Popen[bytes], str]:
    """Start `shoal serve` on loopback for `sessions` sessions; returns the process and its address (``host:port``).

    `pool` is the folder of its prepared items (None: beside the artifact), and `flags` are further options. Raises
    ShoalError when the server does not start.
    """
    ready = artifact / "address"
    ready.unlink(missing_ok=True)
    tls = [f"--{name}={certificates / f}" for name, f in _files("server").items()]
    command = [sys.executable, "-m", "shoal", "serve", str(artifact / "server"), "--listen", "127.0.0.1:0", *tls]
    command += [*flags] if pool is None else [*flags, "--pool", str(pool)]
    log = artifact / "server.log"
    with log.open("w") as sink:  # not a pipe: a full pipe that is not read would block the server
        process = subprocess.Popen(
            [*command, "--sessions", str(sessions), "--ready-file", str(ready)],
            stdout=subprocess.DEVNULL,
            stderr=sink,
        )
    for _ in range(600):
        if ready.exists() and ready.read_text().endswith("\n"):
            return process, ready.read_text().strip()
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    raise ShoalError(f"found that the server did not start: {log.read_text()[-800:]}; need it running; see {log}")


def _files(side: str) -> dict[str, str]:
    return {"cert": f"{side}.pem", "key": f"{side}.key", "ca": "ca.pem"}


def client_tls(certificates: Path) -> TLS:
    """The client's TLS files among those that `shoal certs` wrote."""
    return TLS(**{name: certificates / f for name, f in _files("client").items()})


@contextlib.contextmanager
def serving(
    artifact: Path, certificates: Path, sessions: int, pool: Path | None = None, flags: Sequence[str] = ()
) -> Iterator[str]:
    """Run a server process within the block; yields its address. The server ends after `sessions` sessions."""
    process, address = served(artifact, certificates, sessions, pool, flags)
    try:
        yield address
        process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
