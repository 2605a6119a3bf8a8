"""The operations of a program: steps on shares, their attributes, and the shapes of their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from shoal.errors import ShoalError
from shoal.graph.index import check_index

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One operation on shares. `shape` is the shape of its result without the batch, (C, H, W) or (F,)."""

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: Shape
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """The form of an operation: the names of its attributes, and its result's shape from (step, input shapes)."""

    attrs: tuple[str, ...]
    shape: Callable[..., Shape]


def check_step(step: Step, inputs: list[Shape]) -> None:
    """Raise ShoalError unless `step` is a known operation, has its attributes and fits the shapes of its inputs."""
    if step.op not in OPS:
        raise ShoalError(f"found operation {step.op!r} at {step.name}; need one of {', '.join(OPS)}; rewrite that part")
    op = OPS[step.op]
    missing = [name for name in op.attrs if name not in step.attrs]
    if missing:
        raise ShoalError(f"found {step.op} without {missing} at {step.name}; need all of {list(op.attrs)}")
    try:
        shape = tuple(op.shape(step, *inputs))
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ShoalError(
            f"found {step.op} of shapes {inputs} with {step.attrs} at {step.name}; need a form that it can "
            f"work on ({error}); rewrite that part"
        ) from error
    if shape != step.shape or not shape or min(shape) < 1:
        raise ShoalError(
            f"found {step.op} of shapes {inputs} at {step.name} with result {step.shape}; need {shape}; "
            "rewrite that part with the operation's plain form"
        )


def _window(size: int, kernel: int, stride: int, padding: int = 0, dilation: int = 1) -> int:
    if stride < 1 or dilation < 1 or kernel < 1 or padding < 0:
        raise ValueError("strides, dilations and kernels are at least 1, padding at least 0")
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _conv2d_shape(step: Step, x: Shape) -> Shape:
    (channels, height, width), a, out = x, step.attrs, step.shape[0]
    if a["groups"] < 1 or channels % a["groups"] or out % a["groups"]:
        raise ValueError(f"channels must divide by groups {a['groups']}")
    # `compile` states the kernel's size. A program made by hand may leave that to the weights.
    kernel = a.get("kernel")
    if kernel is None:
        return step.shape
    each = zip((height, width), kernel, a["stride"], a["padding"], a["dilation"], strict=True)
    return (out, *(_window(*side) for side in each))


def _linear_shape(step: Step, x: Shape) -> Shape:
    (_,) = x
    (features,) = step.shape
    return (features,)


def _add_shape(step: Step, x: Shape, y: Shape) -> Shape:
    if x != y:
        raise ValueError("both terms must have one shape")
    return x


def _pool_shape(step: Step, x: Shape) -> Shape:
    channels, height, width = x
    each = zip((height, width), step.attrs["kernel"], step.attrs["stride"], strict=True)
    return (channels, *(_window(*side) for side in each))


def _mean_shape(step: Step, x: Shape) -> Shape:
    channels, _, _ = x
    return (channels, 1, 1) if step.attrs["keepdim"] else (channels,)


def _concat_shape(step: Step, *shapes: Shape) -> Shape:
    if len({shape[1:] for shape in shapes}) != 1:
        raise ValueError("parts may differ in channels only")
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _subsample_shape(step: Step, x: Shape) -> Shape:
    channels, height, width = x
    down, right = step.attrs["stride"]
    return (channels, _window(height, 1, down), _window(width, 1, right))


def _take_shape(step: Step, x: Shape) -> Shape:
    check_index(step.attrs["index"], x)
    return tuple(n if i is None else len(i) for n, i in zip(x, step.attrs["index"], strict=True))


def _pad_shape(step: Step, x: Shape) -> Shape:
    pads = list(step.attrs["pads"])
    if min(pads) < 0 or len(pads) % 2 or len(pads) > 2 * len(x):
        raise ValueError("pads are pairs of zero or more, last dimension first")
    sides = [pads[i] + pads[i + 1] for i in range(0, len(pads), 2)]
    sides = (sides + [0] * (len(x) - len(sides)))[::-1]
    return tuple(size + side for size, side in zip(x, sides, strict=True))


OPS: dict[str, Op] = {
    "conv2d": Op(("stride", "padding", "dilation", "groups"), _conv2d_shape),
    "linear": Op((), _linear_shape),
    "relu": Op((), lambda step, x: x),
    "add": Op((), _add_shape),
    "sub": Op((), _add_shape),
    "avg_pool2d": Op(("kernel", "stride"), _pool_shape),
    "mean": Op(("keepdim",), _mean_shape),
    "flatten": Op((), lambda step, x: (prod(x),)),
    "concat": Op((), _concat_shape),
    "subsample": Op(("stride",), _subsample_shape),
    "take": Op(("index",), _take_shape),
    "pad": Op(("pads",), _pad_shape),
}
LINEAR = ("conv2d", "linear")
"""Operations with weights; each is a product of the server's weights and the client's mask."""
TRUNCATING = ("conv2d", "linear", "avg_pool2d", "mean")
"""Operations whose result is a truncated product."""
