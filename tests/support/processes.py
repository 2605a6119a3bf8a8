"""Servers in threads, the command line as a process, and what becomes of processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS
from tests.support.waiting import HANG, eventually

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def in_thread(server: Server) -> Iterator[Server]:
    """`server` in a thread of this process."""
    thread = threading.Thread(target=server.serve, daemon=True)
    with server:
        thread.start()
        yield server
    thread.join(HANG)
    assert not thread.is_alive()


def children(pid: int) -> list[int]:
    """Children of any of its threads."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(p) for p in listing.read_text().split()]
    return found


def state(pid: int) -> str:
    """The kernel's letter for what process `pid` does: R runs, S sleeps, T is stopped; Z for one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def gone(pid: int) -> bool:
    """Waits until process `pid` has ended."""
    return eventually(lambda: state(pid) in "ZX")


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


def tcp_sockets(pid: int, listening: bool) -> list[int]:
    """The local ports of the TCP sockets of a process, IPv4 and IPv6: those that listen, or all others."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(link))
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()]
    mine = [row for row in rows if f"socket:[{row[9]}]" in inodes]
    return sorted(int(row[1].rpartition(":")[2], 16) for row in mine if (row[3] == "0A") == listening)
