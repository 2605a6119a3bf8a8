"""What the packed products of a step take: work of both parties and bytes of both directions, in closed form.

`exchange` reads the shapes of its messages here, and a test counts the bytes on a connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from shoal.private.products.packing import Packing
from shoal.private.products.parameters import DEGREE, PRIME_BITS

PRIMES = len(PRIME_BITS) - 1
"""Primes of a ciphertext; the last prime is only in keys."""
WORD_BYTES = 8
POLYNOMIAL_BYTES = WORD_BYTES * PRIMES * DEGREE
"""Bytes of one polynomial of weights after its transform."""
KEY_BYTES = 113 + WORD_BYTES * 2 * len(PRIME_BITS) * DEGREE
"""Bytes of the client's public key, which it sends once for a batch: SEAL's header, and two polynomials."""


READY = b"ready"
"""What the server sends before its first answer of a batch."""
AHEAD = 4
"""Messages of the client that may be unanswered."""


def ciphertexts_shape(packing: Packing) -> tuple[int, ...]:
    """Words of the client's message for one tile of one inference: c0 and c1 of every input, modulo each prime."""
    return packing.inputs, 2, PRIMES, DEGREE


def answers_shape(packing: Packing) -> tuple[int, int]:
    """Words of the server's message for one tile: of each answer c1, and the coefficients of c0 that are read.

    The modulus of answers was switched, so a coefficient is one word.
    """
    return packing.answers, DEGREE + packing.co * prod(packing.tile)


@dataclass(frozen=True)
class Work:
    """What the products of a step take for one batch of inferences.

    `transforms` are polynomials of weights that the server transforms, once for the batch. `products` are products of
    a ciphertext and such a polynomial, `sent` ciphertexts from the client, `answers` ciphertexts from the server, and
    `messages` those of both together. `up` and `down` are bytes to the server and to the client. Polynomials of
    weights that are all zero are counted, although they take no work.
    """

    transforms: int = 0
    products: int = 0
    sent: int = 0
    answers: int = 0
    messages: int = 0
    up: int = 0
    down: int = 0


def work(packing: Packing, items: int = 1) -> Work:
    """The work and the bytes of one step for a batch of `items` inferences, without the public key and READY."""
    return Work(
        transforms=packing.weights,
        products=items * packing.products,
        sent=items * packing.count * packing.inputs,
        answers=items * packing.count * packing.answers,
        messages=2 * items * packing.count,
        up=items * packing.count * WORD_BYTES * prod(ciphertexts_shape(packing)),
        down=items * packing.count * WORD_BYTES * prod(answers_shape(packing)),
    )
