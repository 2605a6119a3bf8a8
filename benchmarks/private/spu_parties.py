"""Two processes on this machine that run a compiled network inside SPU, as a yardstick for shoal's own protocol.

SPU's connection is plain TCP on loopback: nothing here is meant for two machines.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import secrets
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from shoal.errors import ShoalError
from shoal.private.program.artifact import load_artifact
from shoal.private.program.images import encoded
from shoal.private.serving.spu_link import spu_threads
from shoal.private.transport.channel import listen

SERVER, CLIENT = 0, 1
WAIT_S = 600.0
"""Seconds to wait for the other party: one step of a large network may take minutes on a small machine."""


def free_port(host: str) -> int:
    """A port of `host` that was free a moment ago."""
    with contextlib.closing(listen(f"{host}:0")) as sock:
        return int(sock.getsockname()[1])


@dataclass(frozen=True)
class Answer:
    """The exits' logits for some images, and what the query cost: seconds, bytes and messages of both directions.

    `memory_bytes` is the peak memory so far of each party's process.
    """

    exits: tuple[np.ndarray, ...]
    seconds: float
    relu_s: float
    linear_s: float
    bytes: int
    messages: int
    memory_bytes: dict[str, int]

    @property
    def logits(self) -> np.ndarray:
        """Those of the last exit."""
        return self.exits[-1]


class SpuParties:
    """The two processes for one artifact, of which both halves are in `folder`. Raises ShoalError if one fails.

    `batch` is the number of images of a query that is compiled at once; other sizes are compiled when first used.
    `shared` weights are secret-shared with the client. `setup_s` are the seconds until both were ready.
    """

    def __init__(self, folder: Path, *, batch: int = 1, shared: bool = False, threads: int | None = None) -> None:
        half, begun = load_artifact(folder, "client"), time.perf_counter()
        self.program = half.program
        ports = [free_port("127.0.0.1") for _ in range(2)]
        order = {"hosts": [f"127.0.0.1:{port}" for port in ports], "session": secrets.token_hex(16), "batch": batch}
        order |= {"shared": shared, "threads": spu_threads(threads), "folder": str(folder)}
        spawn = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in (SERVER, CLIENT):
            mine, theirs = spawn.Pipe()
            self.processes.append(spawn.Process(target=_party, args=(rank, order, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(mine)
        try:
            self._hear()
        except BaseException:
            self.close()
            raise
        self.setup_s = time.perf_counter() - begun

    def __enter__(self) -> SpuParties:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End both processes."""
        for process in self.processes:
            process.kill()
            process.join()

    def query(self, images: np.ndarray) -> Answer:
        """Logits of normalised float `images` [N, C, H, W], and the cost."""
        values = encoded(self.program, images).astype(np.float64) / 2**self.program.fraction_bits
        begun = time.perf_counter()
        with contextlib.suppress(OSError):  # a dead process is noticed next
            self.pipes[SERVER].send((len(images), None))
            self.pipes[CLIENT].send((len(images), values.astype(np.float32)))
        (_, _, server_memory), (exits, tally, client_memory) = self._hear()
        seconds, memory = time.perf_counter() - begun, {"server": server_memory, "client": client_memory}
        traffic = tally["sent"] + tally["received"]
        return Answer(tuple(exits), seconds, tally["relu_s"], tally["linear_s"], traffic, tally["messages"], memory)

    def _hear(self) -> list[Any]:
        """A message of each process."""
        heard: dict[Connection, Any] = {}
        while len(heard) < len(self.pipes):
            ready = wait([pipe for pipe in self.pipes if pipe not in heard], WAIT_S)
            if not ready:
                raise ShoalError(f"found an SPU process silent for {WAIT_S:g} s; need an answer; free memory")
            try:
                heard |= {pipe: pipe.recv() for pipe in self.pipes if pipe in ready}
            except (EOFError, OSError) as error:
                raise ShoalError("found an SPU process dead; need it alive; look for lack of memory") from error
            if failures := [message for message in heard.values() if isinstance(message, str)]:
                raise ShoalError(f"found a failure in an SPU process: {failures[0]}")
        return [heard[pipe] for pipe in self.pipes]


def _party(rank: int, order: dict[str, Any], pipe: Connection) -> None:
    """The work of one process: it makes its executor, then answers queries until it is killed."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            executor = _executor(rank, order, Path(scratch))
            pipe.send(None)
            while True:
                batch, images = pipe.recv()
                logits, tally = executor.query(batch, images)
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                pipe.send((logits, asdict(tally), memory))
    except EOFError:  # the parent has ended
        os._exit(0)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}"[:300])
        os._exit(1)


def _executor(rank: int, order: dict[str, Any], scratch: Path) -> Any:
    from benchmarks.private.executor import Executor
    from shoal.private.engine.spu import LinkLog, Settings
    from shoal.private.program.program import Weights

    log, half = LinkLog(scratch), load_artifact(order["folder"], "server" if rank == SERVER else "client")
    terms = {key: half.terms[key] for key in ("field_bits", "fraction_bits", "ot_kind")}
    settings = Settings(**terms, threads=order["threads"], timeout_s=WAIT_S, link_s=60.0)
    link = _link(rank, order["hosts"], order["session"])
    executor = Executor(half.program, link, rank, settings, log, shared=order["shared"])
    executor.set_weights(Weights.load(half.folder).arrays if rank == SERVER else None)
    executor.prepare(order["batch"])
    executor.warm_up()
    return executor


def _link(rank: int, hosts: list[str], session: str) -> Any:
    from spu import libspu

    desc = libspu.link.Desc()
    desc.id = session
    for name, host in zip(("server", "client"), hosts, strict=True):
        desc.add_party(name, host)
    desc.recv_timeout_ms, desc.http_timeout_ms = int(WAIT_S * 1000), 120_000
    desc.connect_retry_interval_ms, desc.connect_retry_times = 250, 240
    return libspu.link.create_brpc(desc, rank)
