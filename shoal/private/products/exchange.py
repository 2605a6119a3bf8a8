"""Masked products between two parties: the client sends encrypted masks, the server answers with encrypted products.

For each step with a weight W and the client's uniform mask r, modulo 2^k: the client gets W r + s and the server keeps
-s, with s uniform. So the two results are shares of W r. What crosses the connection, in this order:

1. the client's public key, once for each preparation;
2. for each step and inference, the ciphertexts of r, by tiles and blocks of channels;
3. for each of these messages, the answers: c1 of each, and those coefficients of c0 that are read.

The client sends one message ahead, so that both parties work at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np

from shoal.errors import ShoalError
from shoal.private.products.bfv import (
    DEGREE,
    MOST_PLAIN_BITS,
    STATISTICAL,
    Context,
    Evaluator,
    Keys,
    flood_bits,
    noise_bits,
    random_bits,
)
from shoal.private.products.packing import Convolution, Packing, pack
from shoal.private.program.program import Program
from shoal.private.program.steps import Step

PRIMES = 2
AHEAD = 1
"""Messages that the client sends ahead. More could fill the buffers of both parties, and then neither could send."""
Shares = Iterator[tuple[Step, np.ndarray]]


class Connection(Protocol):
    """An ordered connection to the peer."""

    def send(self, data: bytes) -> None: ...

    def receive(self) -> bytes: ...


def plain_bits(program: Program, steps: Sequence[Step]) -> int:
    """The bits of the plaintext modulus: those of the largest ring of `steps`, which are truncated exactly."""
    return max(program.exact[step.name] for step in steps)


def packed_steps(program: Program, steps: Sequence[Step]) -> dict[str, Packing]:
    """The packing of each of `steps` that is truncated exactly in a ring which fits into BFV's parameters."""
    shapes = {program.input: program.input_shape} | {step.name: step.shape for step in program.steps}
    fitting = [s for s in steps if program.exact.get(s.name, MOST_PLAIN_BITS + 1) <= MOST_PLAIN_BITS]
    return {s.name: pack(Convolution.of(s, shapes[s.inputs[0]]), DEGREE) for s in fitting}


class MaskSender:
    """The client's side. Its keys live as long as this object; they are never stored."""

    def __init__(self, connection: Connection, packings: dict[str, Packing], bits: int) -> None:
        self.connection, self.packings, self.keys = connection, packings, Keys(Context(bits))
        connection.send(self.keys.public)

    def products(self, steps: Sequence[Step], masks: Callable[[Step], np.ndarray], count: int) -> Shares:
        """Each step with the client's shares, uint64 [count, *step.shape]. `masks` gives [count, *input shape]."""
        sent = self._sent(steps, masks)
        waiting, done = deque(islice(sent, AHEAD)), list[np.ndarray]()
        while waiting:
            waiting.extend(islice(sent, 1))
            step = waiting.popleft()
            done.append(self._receive(step))
            if len(done) == count:
                yield step, np.stack(done)
                done = []

    def _sent(self, steps: Sequence[Step], masks: Callable[[Step], np.ndarray]) -> Iterator[Step]:
        """Send the message of one inference each time; yields its step."""
        for step in steps:
            for mask in masks(step):
                self._send(self.packings[step.name], mask)
                yield step

    def _send(self, packing: Packing, mask: np.ndarray) -> None:
        blocks = packing.input_polynomials(mask).reshape(-1, DEGREE)
        self.connection.send(b"".join(self.keys.encrypt(block).tobytes() for block in blocks))

    def _receive(self, step: Step) -> np.ndarray:
        packing = self.packings[step.name]
        tiles, read = len(packing.tiles), packing.positions.size
        rows = parse(self.connection.receive(), (tiles * packing.answers, DEGREE + read), "answers")
        answer, found = np.zeros((2, 1, DEGREE), np.uint64), np.empty((len(rows), DEGREE), np.uint64)
        for at, row in enumerate(rows):
            answer[1, 0], answer[0, 0, packing.positions.ravel()] = row[:DEGREE], row[DEGREE:]
            found[at] = self.keys.decrypt(answer)
        return packing.read(found.reshape(tiles, packing.answers, DEGREE)).reshape(step.shape)


class Multiplier:
    """The server's side; `weights` holds the int64 weights of each step by the step's name."""

    def __init__(
        self, connection: Connection, packings: dict[str, Packing], bits: int, weights: dict[str, np.ndarray]
    ) -> None:
        self.connection, self.packings, self.weights, self.bits = connection, packings, weights, bits
        for name, packing in packings.items():
            _check_noise(name, weights[name], packing, bits)
        self.evaluator = Evaluator(Context(bits), connection.receive())

    def products(self, steps: Sequence[Step], count: int) -> Shares:
        """Each step with the server's shares, uint64 [count, *step.shape]."""
        for step in steps:
            packing = self.packings[step.name]
            polynomials = packing.weight_polynomials(self.weights[step.name])
            weights = [self.evaluator.weights(polynomial) for polynomial in polynomials]
            shares = [self._product(packing, weights) for _ in range(count)]
            yield step, np.stack(shares).reshape(count, *step.shape)

    def _product(self, packing: Packing, weights: list[Any]) -> np.ndarray:
        """Answer one inference's ciphertexts; returns the server's share [O, rows, columns]."""
        tiles, read = len(packing.tiles), packing.positions.ravel()
        words = parse(self.connection.receive(), (tiles, packing.inputs, 2, PRIMES, DEGREE), "ciphertexts")
        masks = random_bits(tiles * packing.answers * DEGREE, self.bits).reshape(tiles, packing.answers, DEGREE)
        rows = np.empty((tiles, packing.answers, DEGREE + read.size), np.uint64)
        for tile in range(tiles):
            inputs = [self.evaluator.load(block) for block in words[tile]]
            for at in range(packing.answers):
                used = [(inputs[i], w) for (o, i), w in zip(packing.pairs, weights, strict=True) if o == at]
                answer = self.evaluator.answer(used, masks[tile, at])
                rows[tile, at, :DEGREE], rows[tile, at, DEGREE:] = answer[1, 0], answer[0, 0, read]
        self.connection.send(rows.tobytes())
        return np.uint64(0) - packing.read(masks)


def _check_noise(name: str, weights: np.ndarray, packing: Packing, bits: int) -> None:
    """Raise ShoalError unless the flooding error exceeds the worst noise of this step by STATISTICAL bits."""
    noise, flood = noise_bits(weights, packing.co), flood_bits(bits)
    if flood - noise < STATISTICAL:
        raise ShoalError(
            f"found noise of up to {noise} bits in products of {name}; need at most {flood - STATISTICAL} for a ring "
            f"of {bits} bits, so that answers hide the weights; use fewer fraction bits, or products of SPU"
        )


def parse(data: bytes, shape: tuple[int, ...], what: str) -> np.ndarray:
    """uint64 words of `shape`. Raises ShoalError for another number of bytes."""
    need = 8 * int(np.prod(shape))
    if len(data) != need:
        raise ShoalError(f"found {len(data):,} bytes of {what} from the peer; need {need:,}; use the same artifact")
    return np.frombuffer(data, "<u8").reshape(shape)
