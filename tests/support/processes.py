"""Parties as processes of their own, and as threads, for the tests that need them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS

ROOT = Path(__file__).parents[2]
SERVE = """
import sys
from pathlib import Path
from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS
folder, cert, key, ca = sys.argv[1:]
with Server(folder, "127.0.0.1:0", TLS(Path(cert), Path(key), Path(ca))) as server:
    print(server.address, flush=True)
    server.serve()
"""


def party(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd="/")


def kill(process: subprocess.Popen[str]) -> None:
    """End it; harmless when that was done before."""
    process.kill()
    if process.stdout is not None and not process.stdout.closed:
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextlib.contextmanager
def serving(folder: Path, tls: TLS) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = party(SERVE, folder, tls.cert, tls.key, tls.ca)
    try:
        yield process, said(process)
    finally:
        kill(process)


@contextlib.contextmanager
def in_thread(server: Server) -> Iterator[Server]:
    """`server` in a thread of this process."""
    thread = threading.Thread(target=server.serve, daemon=True)
    with server:
        thread.start()
        yield server
    thread.join(10)
    assert not thread.is_alive()


def children(pid: int) -> list[int]:
    """Children of any of its threads."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(p) for p in listing.read_text().split()]
    return found


def gone(pid: int, seconds: float = 15.0) -> bool:
    """Whether process `pid` ends (or is a zombie) in time."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def eventually(holds: Callable[[], bool], seconds: float = 120.0) -> bool:
    limit = time.monotonic() + seconds
    while not holds() and time.monotonic() < limit:
        time.sleep(0.05)
    return holds()


@contextlib.contextmanager
def shoal(*words: object) -> Iterator[subprocess.Popen[str]]:
    """The command line as a process; what it logs is in its `stderr`."""
    command, environment = [sys.executable, "-m", "shoal", *map(str, words)], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def tls_words(tls: TLS) -> list[object]:
    return ["--cert", tls.cert, "--key", tls.key, "--ca", tls.ca]
