"""The operations of a Program as JAX functions, which SPU compiles. Values are in (N, H, W, C) order here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.private.products import multiply
from shoal.private.program.steps import Step


def _relu(step: Step, x: Any, kept: np.ndarray | None) -> Any:
    if kept is None:
        return jnp.maximum(x, 0.0)
    if not len(kept):
        return x
    # Gathers at public positions are local; a scatter would become a loop over its indices.
    batch, size = x.shape[0], math.prod(x.shape[1:])
    flat, chosen = x.reshape(-1), tile(kept, batch, size)
    # Kept values are gathered from the ReLUs' results, which come first, the others from the input.
    source = np.arange(flat.size, dtype=np.int32) + chosen.size
    source[chosen] = np.arange(chosen.size, dtype=np.int32)
    return _gather(jnp.concatenate([jnp.maximum(_gather(flat, chosen), 0.0), flat]), source).reshape(x.shape)


def tile(positions: np.ndarray, batch: int, size: int) -> np.ndarray:
    """`positions` within each of `batch` flat values of `size` entries that follow one another."""
    return (np.arange(batch, dtype=np.int32)[:, None] * size + positions[None]).reshape(-1).astype(np.int32)


def _gather(flat: Any, positions: np.ndarray) -> Any:
    return flat.at[jnp.asarray(positions)].get(mode="promise_in_bounds", unique_indices=True)


def _mean_of(total: Any, count: int, scale: int) -> Any:
    # The reciprocal is rounded to the fraction bits here, so that SPU's encoding of it is exact.
    return total * np.float32(round(scale / count) / scale) if count > 1 else total


def _avg_pool2d(step: Step, x: Any, scale: int) -> Any:
    (rows, columns), (down, right) = step.attrs["kernel"], step.attrs["stride"]
    _, height, width = step.shape
    parts = [
        x[:, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * right + 1 : right]
        for i in range(rows)
        for j in range(columns)
    ]
    return _mean_of(sum(parts[1:], parts[0]), rows * columns, scale)


def _mean(step: Step, x: Any, scale: int) -> Any:
    total = x.sum((1, 2), keepdims=step.attrs["keepdim"])
    return _mean_of(total, x.shape[1] * x.shape[2], scale)


def _flatten(step: Step, x: Any) -> Any:
    return (x.transpose(0, 3, 1, 2) if x.ndim == 4 else x).reshape(x.shape[0], -1)


def _pad(step: Step, x: Any) -> Any:
    pads = list(step.attrs["pads"]) + [0] * (2 * (x.ndim - 1) - len(step.attrs["pads"]))
    sides = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)][::-1]
    if x.ndim == 4:
        sides = [*sides[1:], sides[0]]
    return jnp.pad(x, [(0, 0), *sides])


def _take(step: Step, x: Any) -> Any:
    axes = (3, 1, 2) if x.ndim == 4 else tuple(range(1, x.ndim))
    for axis, index in zip(axes, step.attrs["index"], strict=True):
        if index is not None:
            # Slices are always local; a gather would move each value by itself.
            parts = [jax.lax.slice_in_dim(x, r.start, r.stop, r.step, axis) for r in progressions(index)]
            x = jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]
    return x


def progressions(index: list[int]) -> list[range]:
    """`index` as consecutive ranges with positive steps, found greedily from the start."""
    runs: list[range] = []
    for i in index:
        last = runs[-1] if runs else range(0)
        step = i - last[-1] if last else 0
        if step > 0 and (len(last) == 1 or step == last.step):
            runs[-1] = range(last.start, i + 1, step)
        else:
            runs.append(range(i, i + 1))
    return runs


EMIT: dict[str, Callable[..., Any]] = {
    "conv2d": lambda step, x, weight, bias: multiply(step, x, weight) + bias,
    "linear": lambda step, x, weight, bias: multiply(step, x, weight) + bias,
    "relu": _relu,
    "add": lambda step, x, y: x + y,
    "sub": lambda step, x, y: x - y,
    "avg_pool2d": _avg_pool2d,
    "mean": _mean,
    "flatten": _flatten,
    "concat": lambda step, *xs: jnp.concatenate(xs, -1),
    "subsample": lambda step, x: x[:, :: step.attrs["stride"][0], :: step.attrs["stride"][1]],
    "take": _take,
    "pad": _pad,
}
"""Each operation in JAX: (step, inputs, then weight and bias, or kept positions, or scale) -> value."""
