"""What a worker computes: answers at the server, encryption and decryption at the client.

A task's methods take and return arrays and bytes, so that the task may run in another process or on another machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.private.products.bfv import Context, Evaluator, Factor, Keys, random_bits
from shoal.private.products.counts import POLYNOMIAL_BYTES
from shoal.private.products.packing import Packing
from shoal.private.products.parameters import DEGREE

HELD_BYTES = 512 << 20
"""Most bytes of weights that all workers of a server hold for the step in work, beside those in their caches."""


@dataclass(frozen=True)
class Layer:
    """One worker's part of a step: some of its answers, each with the weights of which it is computed."""

    packing: Packing
    rows: dict[int, np.ndarray]


class Answers:
    """The server's task: products of ciphertexts with this worker's `layers`.

    The first weights that are used stay in NTT form, up to `cache_bytes`. Of the others, those of the step in work are
    held up to `held_bytes`; what exceeds that is transformed for each use.
    """

    def __init__(self, bits: int, layers: dict[str, Layer], cache_bytes: int, held_bytes: int) -> None:
        self.context, self.layers = Context(bits), layers
        self.most = cache_bytes // POLYNOMIAL_BYTES, held_bytes // POLYNOMIAL_BYTES
        self.kept: dict[tuple[str, int, int], Factor] = {}
        self.held: dict[tuple[str, int, int], Factor] = {}
        self.step = ""

    def start(self, public_key: bytes) -> None:
        """Answer under this key from now on. Raises ShoalError for a key that SEAL refuses."""
        self.evaluator = Evaluator(self.context, public_key)

    def answer(self, name: str, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Answers for one tile of the step `name`, and the masks in them, at the coefficients that are read.

        `words` uint64 [inputs, 2, 2, DEGREE] holds the ciphertexts of `Packing.needed`. The answers are uint64
        [answers, DEGREE + read]: c1, and the read coefficients of c0. The masks are uint64 [answers, read].
        """
        if name != self.step:
            self.step, self.held = name, {}
        layer, read = self.layers[name], self.layers[name].packing.positions.ravel()
        needed = layer.packing.needed(layer.rows)
        inputs = dict(zip(needed, (self.evaluator.load(block) for block in words), strict=True))
        rows = np.empty((len(layer.rows), DEGREE + read.size), np.uint64)
        masks = np.empty((len(layer.rows), read.size), np.uint64)
        for at, answer in enumerate(layer.rows):
            mask = random_bits(DEGREE, self.context.plain_bits)
            own = (index for index in needed if (answer, index) in layer.packing.among)
            made = self.evaluator.answer(((inputs[i], self._factor(name, answer, i)) for i in own), mask)
            rows[at, :DEGREE], rows[at, DEGREE:], masks[at] = made[1, 0], made[0, 0, read], mask[read]
        return rows, masks

    def _factor(self, name: str, answer: int, index: int) -> Factor:
        """The weights of one pair, from a cache or transformed."""
        key = name, answer, index
        found = self.kept.get(key) or self.held.get(key)
        if found is None:
            layer = self.layers[name]
            found = self.evaluator.weights(layer.packing.weight_polynomial(layer.rows[answer], answer, index))
            for table, most in zip((self.kept, self.held), self.most, strict=True):
                if len(table) < most:
                    table[key] = found
                    break
        return found


class Masks:
    """The client's task: encryption of masks and decryption of answers, under one secret key."""

    def __init__(self, bits: int) -> None:
        self.context = Context(bits)

    def start(self, secret_key: bytes) -> None:
        """Use this key from now on."""
        self.keys = Keys(self.context, secret_key)

    def encrypt(self, polynomials: np.ndarray) -> np.ndarray:
        """Ciphertexts uint64 [n, 2, 2, DEGREE] of polynomials uint64 [n, DEGREE]."""
        return np.stack([self.keys.encrypt(polynomial) for polynomial in polynomials])

    def decrypt(self, rows: np.ndarray, read: np.ndarray) -> np.ndarray:
        """The coefficients at `read` of answers uint64 [n, DEGREE + read.size], as the server sent them."""
        answer, found = np.zeros((2, 1, DEGREE), np.uint64), np.empty((len(rows), read.size), np.uint64)
        for at, row in enumerate(rows):
            answer[1, 0], answer[0, 0, read] = row[:DEGREE], row[DEGREE:]
            found[at] = self.keys.decrypt(answer)[read]
        return found


TASKS: dict[str, Any] = {"answers": Answers, "masks": Masks}
