"""How many answers SPU gives to a matrix product, and how many rows a product with a single answer may have."""

from __future__ import annotations

from functools import cache

import numpy as np

from shoal.errors import ShoalError

DEGREE = 8192
"""Coefficients of a polynomial in SPU's matrix products."""


@cache
def rows_of_one_answer(rows: int, inner: int, outputs: int) -> int:
    """The largest of `rows`, its half, its quarter and so on (rounded up) whose product has one answer.

    Raises ShoalError when even one row has several.
    """
    while answers(rows, inner, outputs) > 1:
        if rows == 1:
            raise ShoalError(f"found {outputs} outputs of a layer; need fewer, so that SPU's product has one answer")
        rows = -(-rows // 2)
    return rows


def answers(rows: int, inner: int, outputs: int) -> int:
    """How many ciphertexts SPU 0.9.5 answers a product of [rows, inner] and [inner, outputs] with.

    A ciphertext holds a block of each matrix. SPU takes the block sizes for which ciphertexts, automorphisms and
    products cost least. It packs the answers of several blocks into one ciphertext if there are several.
    """
    block = _block(rows, inner, outputs, packed=True)
    count = -(-rows // block[0]) * -(-outputs // block[2])
    if count == 1:
        block = _block(rows, inner, outputs, packed=False)
        return -(-rows // block[0]) * -(-outputs // block[2])
    if block[1] >= rows * outputs:
        return -(-rows * outputs // DEGREE)
    return -(-count // block[1])


def _block(rows: int, inner: int, outputs: int, packed: bool) -> tuple[int, int, int]:
    """SPU's block: the last of those that cost least, with growing rows and then growing inner size."""
    best, least = (1, 1, 1), np.inf
    sizes = [1 << i for i in range(inner.bit_length()) if 1 << i <= inner] if packed else range(1, inner + 1)
    for high in range(1, min(DEGREE, rows) + 1):
        for deep in sizes:
            if high * deep > DEGREE:
                break
            wide = min(outputs, DEGREE // high // deep)
            tall, long, broad = -(-rows // high), -(-inner // deep), -(-outputs // wide)
            sent, answered = min(tall, broad) * long, -(-tall * broad // deep)
            turned = -(-rows * outputs // DEGREE) * deep if packed else 0
            cost = 1000.0 * (sent + answered) + turned + tall * long * broad / 10
            if cost <= least:
                best, least = (high, deep, wide), cost
    return best
