"""SPU in a process of its own, and the parent's handle of that process.

SPU blocks in C++ while it waits for the peer, logs for the whole process and never frees its memory. A process can be
killed at any moment, which frees everything.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import shoal
from shoal.errors import ShoalError
from shoal.private.transport.channel import Channel, ClosedError
from shoal.private.transport.tunnel import SPU_SOCKET, TUNNEL_SOCKET, Tunnel, listen_locally

MAX_PAYLOAD = (1 << 32) - 1


class Worker:
    """The parent's handle: a child process, the channel to it, and a temporary folder for its logs and sockets.

    SPU's connection leaves the folder through a `Tunnel` only, which `carry` starts.
    """

    tunnel: Tunnel | None

    def __init__(self, start: dict[str, Any]) -> None:
        self.scratch, self.listener = _private_folder()
        self.rank, self.tunnel = start["rank"], None
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours, "the SPU process", MAX_PAYLOAD)
        with theirs, open(self.scratch / "worker.log", "wb") as log:
            self.process = subprocess.Popen(
                # Not -m: the package may have imported this module already. -P would need Python 3.11.
                [sys.executable, "-c", "from shoal.private.engine.worker import main; main()", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                cwd=self.scratch,
                env=os.environ | {"PYTHONPATH": _import_path()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.channel.send({"type": "start", "scratch": str(self.scratch), **start})

    def carry(self, link: Channel) -> None:
        """Carry SPU's connection over `link`, the second connection to the peer."""
        self.tunnel = Tunnel(link, self.listener, self.scratch / SPU_SOCKET, self.rank)

    def log_tail(self) -> str:
        """The last line that the process printed, for error messages."""
        text = (self.scratch / "worker.log").read_text(errors="replace").strip()
        return text.splitlines()[-1][:300] if text else "it printed nothing"

    def end(self) -> None:
        """Kill the process if it is still running, end its connection, and remove its folder."""
        if self.tunnel is not None:
            self.tunnel.close()
        self.listener.close()
        self.process.kill()
        self.process.wait()
        self.channel.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


def _private_folder() -> tuple[Path, socket.socket]:
    """A temporary folder with mode 0700, and the socket in it to which SPU connects."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-"))
    try:
        return folder, listen_locally(folder / TUNNEL_SOCKET)
    except ShoalError:
        folder.rmdir()
        raise


def _import_path() -> str:
    # The child must import the same shoal, also when it runs from a checkout.
    parts = [str(Path(next(iter(shoal.__path__))).resolve().parent), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(p for p in parts if p)


def main() -> None:
    """Entry point of the child process. Its only argument is the number of the inherited socket."""
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), "the parent", MAX_PAYLOAD)
    orders: queue.Queue[tuple[dict[str, Any], bytes]] = queue.Queue()
    # Ctrl-C reaches the whole foreground; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_read_orders, args=(channel, orders), daemon=True).start()
    try:
        _work(channel, orders)
    except Exception as error:  # Every failure must reach the parent as a sentence.
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(ShoalError):
            channel.send({"type": "error", "message": _sentence(error)})
    # SPU's threads may still wait for the peer, and a normal exit would wait for them.
    os._exit(0)


def _read_orders(channel: Channel, orders: queue.Queue[tuple[dict[str, Any], bytes]]) -> None:
    """Pass orders on. When the parent is gone, end this process even while SPU blocks."""
    try:
        while True:
            channel.wait()
            orders.put(channel.receive())
    except ClosedError:
        # The parent can no longer remove the folder, in which this process runs (see Worker).
        shutil.rmtree(Path.cwd(), ignore_errors=True)
        os._exit(1)


def _work(channel: Channel, orders: queue.Queue[tuple[dict[str, Any], bytes]]) -> None:
    order, _ = orders.get()
    task = _Prepare(order)
    channel.send({"type": "ready"})
    while True:
        order, _ = orders.get()
        if order["type"] == "stop":
            return
        channel.send({"type": "done", **task.answer(order)})


class _Prepare:
    """Makes prepared items and stages them in a pool."""

    def __init__(self, order: dict[str, Any]) -> None:
        # Making items can wait, so all other processes of this machine come first.
        os.nice(order["nice"])
        from shoal.private.engine.maker import SpuEngine
        from shoal.private.engine.runs import instances
        from shoal.private.engine.spu import LinkLog, Settings, open_link
        from shoal.private.program.program import Program, Weights
        from shoal.private.protocol.layout import Layout

        self.log = LinkLog(Path(order["scratch"]))
        settings, self.rank = Settings(**order["settings"]), order["rank"]
        self.program = Program.load(order["folder"])
        self.layout = Layout(self.program)
        link = open_link(self.rank, Path(order["scratch"]), order["session"], settings)
        weights = Weights.load(order["folder"]) if self.rank == SERVER else None
        self.weights = "" if weights is None else weights.digest()
        if settings.products == "seal":
            # SPU's products use all threads; its ANDs would only open more instances of Ferret.
            settings = replace(settings, threads=min(settings.threads, instances(self.layout, order["batch"])))
        arrays = None if weights is None else weights.arrays
        self.engine = SpuEngine(self.program, link, self.rank, settings, arrays)

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Make one batch of items with the names in the order; returns seconds and traffic."""
        from shoal.private.protocol.offline import prepare
        from shoal.private.protocol.pool import stage
        from shoal.private.protocol.randomness import new_seed

        begun, client = time.perf_counter(), self.rank != SERVER
        self.log.read()
        self.engine.runs.clear()
        self.engine.sealed.clear()
        halves = prepare(self.layout, self.engine, client, [new_seed() for _ in order["names"]])
        for name, half in zip(order["names"], halves, strict=True):
            stage(Path(order["pool"]), name, half, self.program.digest(), client, self.weights)
        steps: dict[str, float] = {}
        for kind, step, seconds in self.engine.runs:
            if kind == "product":
                steps[step] = steps.get(step, 0.0) + seconds
        for step, seconds, _, _ in self.engine.sealed:
            steps[step] = seconds
        lines = self.log.read()
        sent = sum(line[0] for line in lines) + sum(row[2] for row in self.engine.sealed)
        received = sum(line[1] for line in lines) + sum(row[3] for row in self.engine.sealed)
        traffic = {"sent": sent, "received": received}
        kinds = self._kinds(lines, len(order["names"]))
        facts = {"seconds": time.perf_counter() - begun, "kinds": kinds, "steps": steps}
        # The workers' memory is this party's, too.
        workers = 0 if self.engine.crew is None else self.engine.crew.memory()
        return facts | traffic | {"memory": _peak_memory() + workers}

    def _kinds(self, lines: list[tuple[int, int, int, int]], items: int) -> dict[str, dict[str, float]]:
        """Seconds, bytes and messages of each kind of product for a batch of `items`."""
        from shoal.private.products.counts import work

        kinds: dict[str, dict[str, float]] = {}
        for (kind, _, seconds), line in zip(self.engine.runs, lines, strict=True):
            row = kinds.setdefault(kind, {"seconds": 0.0, "bytes": 0, "messages": 0})
            row["seconds"] += seconds
            row["bytes"] += line[0] + line[1]
            row["messages"] += line[2] + line[3]
        if self.engine.sealed:
            row = kinds.setdefault("product", {"seconds": 0.0, "bytes": 0, "messages": 0})
            for step, seconds, sent, received in self.engine.sealed:
                row["seconds"] += seconds
                row["bytes"] += sent + received
                row["messages"] += work(self.engine.packings[step], items).messages
        return kinds


SERVER = 0


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _sentence(error: Exception) -> str:
    # SPU appends a stack trace after its first lines.
    text = " ".join(str(error).split("stacktrace")[0].split())[:300]
    return text if isinstance(error, ShoalError) else f"found {type(error).__name__} in SPU: {text}"
