"""Parties forked from a process that has the imports: a start takes milliseconds, and a death is a real SIGKILL."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.private.protocol.online import Inference
from shoal.private.protocol.pool import Pool
from shoal.private.protocol.randomness import Half
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import Channel
from shoal.private.transport.wire import HEADER, SocketWire
from tests.support.waiting import HANG

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["numpy", "torch", "shoal.private.serving.client"])
TURNS = 11
"""Messages of the small network one after the other: three linear layers, two of ReLUs, the logits."""
STEPS = ("claim", "claimed", "told", *(f"message {k}" for k in range(TURNS)), "done")
"""Of one inference at either party: before and after its claim, its "infer" (before the claim) or "go" (after), its
messages, the end."""


@contextlib.contextmanager
def forked(work: Callable[..., None], *arguments: Any, **more: Any) -> Iterator[tuple[BaseProcess, Connection]]:
    """`work(pipe, *arguments, **more)` in a process of its own, and this end of the pipe."""
    mine, theirs = FORKS.Pipe()
    process = FORKS.Process(target=_run, args=(work, theirs, *arguments), kwargs=more, daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, mine
    finally:
        process.kill()
        process.join(HANG)
        mine.close()


def _run(work: Callable[..., None], *arguments: Any, **more: Any) -> None:
    logging.disable(logging.CRITICAL)  # a session that breaks is what these tests are about
    torch.set_num_threads(1)
    work(*arguments, **more)


def heard(pipe: Connection) -> Any:
    """What the process says next; fails when it is silent."""
    assert pipe.poll(HANG), "the process says nothing"
    return pipe.recv()


@contextlib.contextmanager
def serving(folder: Path, tls: TLS, **more: Any) -> Iterator[tuple[BaseProcess, str]]:
    """A server with its pool beside the artifact, and its address; `more` are options of the server."""
    with forked(serve, folder, tls, None, **more) as (process, pipe):
        yield process, heard(pipe)


def serve(
    pipe: Connection, folder: Path, tls: TLS, pool: Path | None, step: str = "", ending: int = 0, **more: Any
) -> None:
    """A server that says its address and, asked anything, its errors; `ending` befalls it at `step`."""
    befall(step, ending)
    with Server(folder, "127.0.0.1:0", tls, ServerOptions(pool=pool, **more)) as server:
        threading.Thread(target=server.serve, daemon=True).start()
        pipe.send(server.address)
        while pipe.recv():
            pipe.send(server.errors)


def ask(pipe: Connection, folder: Path, tls: TLS, pool: Path, address: str, image: np.ndarray, *fate: Any) -> None:
    """A client that queries once and says the logits."""
    befall(*fate)
    with Client(folder, address, tls, ClientOptions(pool=pool)) as client:
        pipe.send(client.query(image).logits)


def go_on_asking(
    pipe: Connection, folder: Path, tls: TLS, address: str, pool: Path, images: np.ndarray, make: int = 0
) -> None:
    """A client that makes items, then queries while some are left, then waits. It says what it begins."""
    client = Client(folder, address, tls, ClientOptions(pool=pool))
    if make:
        client.prepare(make, progress=lambda made, _: pipe.send(f"made {made}"))
    with client:
        pipe.send("open")
        while client.ready >= len(images):
            client.query(images)
        time.sleep(HANG)


def befall(step: str, ending: int) -> None:
    """Send this process the signal `ending` at `step` of its first inference."""
    if not step:
        return
    claim, send, both, run = Pool.claim, Channel.send, SocketWire._both, Inference.run

    def meet(found: str) -> None:
        if found == step:
            os.kill(os.getpid(), ending)
            time.sleep(HANG)  # it may take the kernel a moment

    def claiming(pool: Pool, name: object, read: Half | None = None) -> Any:
        meet("claim")
        half = claim(pool, name, read)
        meet("claimed")
        return half

    def sending(channel: Channel, message: dict[str, Any], payload: bytes = b"") -> None:
        send(channel, message, payload)
        if message["type"] in ("infer", "go"):
            meet("told")

    def moving(wire: SocketWire, mine: np.ndarray | None, words: int) -> np.ndarray:
        if step == f"message {wire.turn}" and mine is not None:
            frame = HEADER.pack(wire.turn, mine.nbytes) + mine.tobytes()
            wire.sock.setblocking(True)
            wire.sock.sendall(frame[: len(frame) // 2])  # the peer is left with a part of it
        meet(f"message {wire.turn}")
        return both(wire, mine, words)

    def running(self: Inference, *arguments: Any) -> Any:
        out = run(self, *arguments)
        meet("done")
        return out

    Pool.claim, Channel.send = claiming, sending  # type: ignore[method-assign]
    SocketWire._both, Inference.run = moving, running  # type: ignore[method-assign]
