"""Linear layers of ring words inside SPU, cut so that each of SPU's matrix products has one answer.

SPU re-randomises all answers of one product with the same encryption of zero, and so reveals how they differ (see
docs/threat_model.md). A product with a single answer shares nothing. So the rows of a larger one are multiplied in
pieces. SPU itself turns a convolution into a matrix product, a row for each output position; here this is done before,
because only rows can be cut.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from benchmarks.private.answers import rows_of_one_answer
from shoal.private.program.steps import Step


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
