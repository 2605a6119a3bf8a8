"""Linear layers of ring words inside SPU, cut so that each of SPU's matrix products has one answer.

SPU re-randomises all answers of one product with the same encryption of zero, and so reveals how they differ (see
docs/threat_model.md). A product with a single answer shares nothing. So the rows of a larger one are multiplied in
pieces. SPU itself turns a convolution into a matrix product, a row for each output position; here this is done before,
because only rows can be cut.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np

from shoal.errors import ShoalError
from shoal.private.program.steps import Step

DEGREE = 8192
"""Coefficients of a polynomial in SPU's matrix products."""


def multiply(step: Step, x: Any, weight: Any) -> Any:
    """The convolution or matrix product of `step` without its bias."""
    return _convolve(step, x, weight) if step.op == "conv2d" else _rows_times(x, weight)


def _convolve(step: Step, x: Any, weight: Any) -> Any:
    """Each group's windows as rows, times its kernel as a matrix."""
    groups, outputs = step.attrs["groups"], step.shape[0]
    x = jnp.pad(x, ((0, 0), *((p, p) for p in step.attrs["padding"]), (0, 0)))
    if step.attrs["kernel"] == [1, 1] and groups == outputs == x.shape[3] and step.attrs["stride"] == [1, 1]:
        return x * weight.reshape(-1)  # value by value; SPU encrypts a fresh zero for each answer of these
    parts = []
    for values, kernel in zip(jnp.split(x, groups, 3), jnp.split(weight, groups, 3), strict=True):
        windows = _windows(step, values)
        rows = windows.reshape(-1, windows.shape[3])
        parts.append(_rows_times(rows, kernel.reshape(-1, outputs // groups)))
    return jnp.concatenate(parts, 1).reshape(x.shape[0], *step.shape[1:], outputs)


def _windows(step: Step, x: Any) -> Any:
    """The values under the kernel at each output position, [N, H, W, kernel height * kernel width * channels]."""
    (height, width), (down, right) = step.shape[1:], step.attrs["stride"]
    (rows, columns), (far_down, far_right) = step.attrs["kernel"], step.attrs["dilation"]
    parts = []
    for i in range(0, rows * far_down, far_down):
        for j in range(0, columns * far_right, far_right):
            parts.append(x[:, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * right + 1 : right])
    return jnp.concatenate(parts, 3)


def _rows_times(x: Any, weight: Any) -> Any:
    """`x` [rows, inner] times `weight` [inner, outputs], by products that have one answer each."""
    most = rows_of_one_answer(*x.shape, weight.shape[1])
    parts = [x[start : start + most] @ weight for start in range(0, x.shape[0], most)]
    return jnp.concatenate(parts, 0) if len(parts) > 1 else parts[0]


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
