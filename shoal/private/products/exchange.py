"""Masked products between two parties: the client sends encrypted masks, the server answers with encrypted products.

For each step with a weight W and the client's uniform mask r, modulo 2^k: the client gets W r + s and the server keeps
-s, with s uniform. So the two results are shares of W r. What crosses the connection for a batch, in this order each
way:

1. client to server: a fresh public key; then for each step, inference and tile, the ciphertexts of its blocks of r;
2. server to client: READY; then for each of these messages one of answers: c1 of each, and those coefficients of c0
   that are read.

Both parties work at the same time, because up to AHEAD messages of the client may be unanswered. This cannot deadlock:

- at each party one thread only sends and another one only receives, so no party stops reading because it cannot send;
- the server's receiving thread puts messages into a queue of AHEAD places. It always has room, because the client's
  sending thread waits for an answer before it sends a message beyond that number;
- the client's receiving thread waits for answers only, and the server owes one for each message that was sent.

READY has a second use: each end of SPU's connection has then sent and received, which creates its counters. After
that, its two directions may be used by two threads.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np

from shoal.errors import ShoalError
from shoal.private.products.bfv import Context, make_keys
from shoal.private.products.counts import AHEAD, READY, answers_shape, ciphertexts_shape
from shoal.private.products.packing import Packing
from shoal.private.products.parameters import STATISTICAL, margin_bits
from shoal.private.products.tasks import HELD_BYTES, Layer
from shoal.private.products.workers import Crew
from shoal.private.program.steps import Step

Shares = Iterator[tuple[Step, np.ndarray]]
Part = tuple[tuple[int, ...], Future[Any]]
"""Some answers of a message, and the call that computes them."""


class Connection(Protocol):
    """An ordered connection to the peer."""

    def send(self, data: bytes) -> None: ...

    def receive(self) -> bytes: ...


class MaskSender:
    """The client's side, whose `crew` encrypts and decrypts. Its keys live for one batch; they are never stored."""

    def __init__(self, packings: dict[str, Packing], bits: int, crew: Crew) -> None:
        self.packings, self.context, self.crew = packings, Context(bits), crew
        crew.each("build", [("masks", bits)] * len(crew))

    def products(
        self, connection: Connection, steps: Sequence[Step], masks: Callable[[Step], np.ndarray], count: int
    ) -> Shares:
        """Each step with the client's shares, uint64 [count, *step.shape]. `masks` gives [count, *input shape]."""
        public, secret = make_keys(self.context)
        self.crew.each("start", [(secret,)] * len(self.crew))
        connection.send(public)
        if connection.receive() != READY:
            raise ShoalError("found other bytes than need before the answers of products; use one version of shoal")
        sent: queue.Queue[Exception | None] = queue.Queue()
        room = threading.Semaphore(AHEAD)

        def send() -> None:
            try:
                for step in steps:
                    for mask in masks(step):
                        for blocks in self.packings[step.name].input_polynomials(mask):
                            room.acquire()
                            connection.send(self._encrypted(blocks))
                            sent.put(None)
            except Exception as error:  # the receiving thread raises it
                sent.put(error)

        threading.Thread(target=send, daemon=True).start()
        for step in steps:
            packing, shares = self.packings[step.name], np.empty((count, *step.shape), np.uint64)
            for share in shares:
                values = []
                for _ in packing.tiles:
                    if (error := sent.get()) is not None:
                        raise error
                    values.append(self._decrypted(packing, connection.receive()))
                    room.release()
                share[...] = packing.place(np.stack(values)).reshape(step.shape)
            yield step, shares

    def _encrypted(self, blocks: np.ndarray) -> bytes:
        parts = np.array_split(blocks, min(len(self.crew), len(blocks)))
        return b"".join(part.tobytes() for part in self.crew.each("encrypt", [(part,) for part in parts]))

    def _decrypted(self, packing: Packing, data: bytes) -> np.ndarray:
        """uint64 [answers, read] of a message of answers."""
        read = packing.positions.ravel()
        rows = parse(data, answers_shape(packing), "answers")
        parts = np.array_split(rows, min(len(self.crew), len(rows)))
        return np.concatenate(self.crew.each("decrypt", [(part, read) for part in parts]))


class Multiplier:
    """The server's side; `weights` holds the int64 weights of each step by the step's name.

    Each worker of `crew` computes some answers of every step, so that all workers share each message and each
    transforms and keeps its own weights only, up to `cache_bytes` together.
    """

    def __init__(
        self, packings: dict[str, Packing], bits: int, weights: dict[str, np.ndarray], crew: Crew, cache_bytes: int = 0
    ) -> None:
        self.packings, self.crew = packings, crew
        for name, packing in packings.items():
            _check_noise(name, weights[name], packing, bits)
        self.duties = _duties(packings, len(crew))
        sizes = cache_bytes // len(crew), HELD_BYTES // len(crew)
        layers = [
            {
                name: Layer(packings[name], {o: packings[name].rows(weights[name], o) for o in own})
                for name, own in duty.items()
            }
            for duty in self.duties
        ]
        crew.each("build", [("answers", bits, own, *sizes) for own in layers])

    def products(self, connection: Connection, steps: Sequence[Step], count: int) -> Shares:
        """Each step with the server's shares, uint64 [count, *step.shape]."""
        self.crew.each("start", [(key,) for key in [connection.receive()] * len(self.crew)])
        connection.send(READY)
        waiting: queue.Queue[list[Part] | Exception] = queue.Queue(AHEAD)

        def receive() -> None:
            try:
                for step in steps:
                    for _ in range(count * len(self.packings[step.name].tiles)):
                        waiting.put(self._parts(step.name, connection.receive()))
            except Exception as error:  # the sending thread raises it
                waiting.put(error)

        threading.Thread(target=receive, daemon=True).start()
        for step in steps:
            packing, shares = self.packings[step.name], np.empty((count, *step.shape), np.uint64)
            for share in shares:
                masks = np.stack([self._send(connection, packing, waiting.get()) for _ in packing.tiles])
                share[...] = np.uint64(0) - packing.place(masks).reshape(step.shape)
            yield step, shares

    def _parts(self, name: str, data: bytes) -> list[Part]:
        """Queue the answers of one message at the workers."""
        packing = self.packings[name]
        words = parse(data, ciphertexts_shape(packing), "ciphertexts")
        parts = []
        for at, duty in enumerate(self.duties):
            if name in duty:
                used = packing.needed(duty[name])
                own = words if len(used) == len(words) else words[list(used)]
                parts.append((duty[name], self.crew.submit(at, "answer", name, own)))
        return parts

    def _send(self, connection: Connection, packing: Packing, parts: list[Part] | Exception) -> np.ndarray:
        """Send the answers of one message; returns the masks in them, uint64 [answers, read]."""
        if isinstance(parts, Exception):
            raise parts
        rows = np.empty(answers_shape(packing), np.uint64)
        masks = np.empty((packing.answers, packing.positions.size), np.uint64)
        for own, call in parts:
            rows[list(own)], masks[list(own)] = call.result()
        connection.send(rows.tobytes())
        return masks


def _duties(packings: dict[str, Packing], workers: int) -> list[dict[str, tuple[int, ...]]]:
    """For each worker, its answers of each step: all answers of all steps are dealt in turn."""
    duties: list[dict[str, tuple[int, ...]]] = [{} for _ in range(workers)]
    first = 0
    for name, packing in packings.items():
        for at, duty in enumerate(duties):
            own = tuple(range((at - first) % workers, packing.answers, workers))
            if own:
                duty[name] = own
        first += packing.answers
    return duties


def _check_noise(name: str, weights: np.ndarray, packing: Packing, bits: int) -> None:
    """Raise ShoalError unless the flooding error exceeds the worst noise of this step by STATISTICAL bits."""
    margin = margin_bits(weights, packing, bits)
    if margin < STATISTICAL:
        raise ShoalError(
            f"found a margin of {margin} bits between flooding and noise in products of {name}; need {STATISTICAL} for "
            "answers that hide the weights; use fewer fraction bits, or products of SPU"
        )


def parse(data: bytes, shape: tuple[int, ...], what: str) -> np.ndarray:
    """uint64 words of `shape`. Raises ShoalError for another number of bytes."""
    need = 8 * int(np.prod(shape))
    if len(data) != need:
        raise ShoalError(f"found {len(data):,} bytes of {what} from the peer; need {need:,}; use the same artifact")
    return np.frombuffer(data, "<u8").reshape(shape)
