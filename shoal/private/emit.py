"""A Program as JAX functions, one a segment, the form that SPU compiles. Maps are NHWC inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.private.clear import Step
from shoal.private.program import Program


@dataclass(frozen=True)
class Segment:
    """Steps that run as one executable: all ReLUs, or none, so that each kind's seconds can be told apart."""

    kind: str
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]


def segments(program: Program) -> list[Segment]:
    """The program cut into maximal runs of non-ReLU steps and single ReLU steps, in order."""
    runs: list[list[Step]] = []
    for step in program.steps:
        if step.op == "relu" or not runs or runs[-1][-1].op == "relu":
            runs.append([])
        runs[-1].append(step)
    return [_segment(program, runs, i) for i in range(len(runs))]


def _segment(program: Program, runs: list[list[Step]], i: int) -> Segment:
    own = {step.name for step in runs[i]}
    read = dict.fromkeys(name for step in runs[i] for name in step.inputs)
    later = {name for run in runs[i + 1 :] for step in run for name in step.inputs} | set(program.outputs)
    linear = [step.name for step in runs[i] if step.op in ("conv2d", "linear")]
    return Segment(
        "relu" if runs[i][0].op == "relu" else "linear",
        tuple(runs[i]),
        tuple(name for name in read if name not in own),
        tuple(f"{name}.{part}" for name in linear for part in ("weight", "bias")),
        tuple(step.name for step in runs[i] if step.name in later),
    )


def function(program: Program, segment: Segment) -> Callable[..., Any]:
    """(values of `inputs`, then weights) -> tuple of `outputs`, over floats that are fixed-point words."""

    def run(*arguments: Any) -> Any:
        values = dict(zip((*segment.inputs, *segment.weights), arguments, strict=True))
        for step in segment.steps:
            values[step.name] = EMIT[step.op](program, step, values, *(values[name] for name in step.inputs))
        return tuple(values[name] for name in segment.outputs)

    return run


def to_nhwc(array: np.ndarray) -> np.ndarray:
    """Images [N, C, H, W] as SPU sees them."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def weight_layout(name: str, weight: np.ndarray) -> np.ndarray:
    """A step's weight as the emitted function takes it: HWIO for convolutions, [F, O] for linear layers."""
    if weight.ndim == 4:
        return np.ascontiguousarray(weight.transpose(2, 3, 1, 0))
    return np.ascontiguousarray(weight.T) if weight.ndim == 2 else weight


def shape_nhwc(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """The emitted shape of a value whose shape without batch is `shape`."""
    return (batch, *shape[1:], shape[0]) if len(shape) == 3 else (batch, *shape)


def _conv2d(program: Program, step: Step, values: dict[str, Any], x: Any) -> Any:
    from jax import lax

    w, b = values[f"{step.name}.weight"], values[f"{step.name}.bias"]
    a = step.attrs
    if w.shape[:3] == (1, 1, 1) and a["groups"] == w.shape[3]:
        return x * w[0, 0, 0] + b  # a batch norm that no convolution could take in: one product a channel
    padding = [(p, p) for p in a["padding"]]
    y = lax.conv_general_dilated(
        x,
        w,
        a["stride"],
        padding,
        rhs_dilation=a["dilation"],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=a["groups"],
    )
    return y + b


def _linear(program: Program, step: Step, values: dict[str, Any], x: Any) -> Any:
    return x @ values[f"{step.name}.weight"] + values[f"{step.name}.bias"]


def _relu(program: Program, step: Step, values: dict[str, Any], x: Any) -> Any:
    """Gather the kept positions, take their maximum with 0, put all back: public indices cost no communication.

    A scatter would become a loop with one iteration an index.
    """
    import jax.numpy as jnp

    if step.name not in program.keep:
        return jnp.maximum(x, 0.0)
    keep = _nhwc_positions(program.keep[step.name], step.shape)
    flat = x.reshape(x.shape[0], -1)
    rest = np.setdiff1d(np.arange(flat.shape[1]), keep)
    y = jnp.concatenate([jnp.maximum(_take(flat, keep), 0.0), _take(flat, rest)], axis=1)
    return _take(y, np.argsort(np.concatenate([keep, rest]))).reshape(x.shape)


def _nhwc_positions(positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) != 3:
        return positions
    c, h, w = np.unravel_index(positions, shape)
    return np.ravel_multi_index((h, w, c), (shape[1], shape[2], shape[0]))


def _take(flat: Any, index: np.ndarray) -> Any:
    return flat.at[:, index].get(mode="promise_in_bounds", unique_indices=True)


def _avg_pool2d(program: Program, step: Step, values: dict[str, Any], x: Any) -> Any:
    (kh, kw), (sh, sw) = step.attrs["kernel"], step.attrs["stride"]
    _, rows, columns = step.shape
    total = sum(
        x[:, i : i + sh * (rows - 1) + 1 : sh, j : j + sw * (columns - 1) + 1 : sw, :]
        for i in range(kh)
        for j in range(kw)
    )
    return total * _reciprocal(program, kh * kw)


def _mean(program: Program, step: Step, values: dict[str, Any], x: Any) -> Any:
    total = x.sum((1, 2), keepdims=step.attrs["keepdim"])
    return total * _reciprocal(program, x.shape[1] * x.shape[2])


def _reciprocal(program: Program, count: int) -> np.float32:
    scale = 1 << program.fraction_bits
    return np.float32(round(scale / count) / scale)


def _flatten(program: Program, step: Step, values: dict[str, Any], x: Any) -> Any:
    if x.ndim == 4:
        x = x.transpose(0, 3, 1, 2)  # features are numbered in C, H, W order
    return x.reshape(x.shape[0], -1)


def _concat(program: Program, step: Step, values: dict[str, Any], *xs: Any) -> Any:
    import jax.numpy as jnp

    return jnp.concatenate(xs, axis=-1)


def _subsample(program: Program, step: Step, values: dict[str, Any], x: Any) -> Any:
    rows, columns = step.attrs["stride"]
    return x[:, ::rows, ::columns, :]


def _pad(program: Program, step: Step, values: dict[str, Any], x: Any) -> Any:
    import jax.numpy as jnp

    # torch lists pads from the last dimension on: width, height, channels.
    pads = [*step.attrs["pads"], 0, 0, 0, 0, 0, 0][:6]
    left, right, top, bottom, front, back = pads
    return jnp.pad(x, ((0, 0), (top, bottom), (left, right), (front, back)))


EMIT: dict[str, Callable[..., Any]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "relu": _relu,
    "add": lambda program, step, values, x, y: x + y,
    "avg_pool2d": _avg_pool2d,
    "mean": _mean,
    "flatten": _flatten,
    "concat": _concat,
    "subsample": _subsample,
    "pad": _pad,
}
"""Step type -> what it computes: (program, step, values, inputs)."""
