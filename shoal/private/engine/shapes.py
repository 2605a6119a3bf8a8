"""Shapes and axes of values and weights in SPU's order.

SPU convolves NHWC values with HWIO kernels, so values are in (H, W, C) order there.
"""

from __future__ import annotations

import numpy as np

from shoal.errors import ShoalError
from shoal.private.program.program import Program


def channels_last(rank: int) -> tuple[int, ...]:
    """Axes that transpose (C, H, W) to (H, W, C), after the batch axis; other ranks stay as they are."""
    return (2, 3, 1) if rank == 3 else tuple(range(1, rank + 1))


def hwc(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (C, H, W) as (H, W, C); other shapes unchanged."""
    return (*shape[1:], shape[0]) if len(shape) == 3 else shape


def in_spu_order(array: np.ndarray) -> np.ndarray:
    """A parameter in SPU's order: OIHW kernels as HWIO, [out, in] matrices as [in, out], biases unchanged."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def parameter_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Shapes of weights and biases in SPU's order. Raises ShoalError where the program states no kernel size."""
    before = {program.input: program.input_shape} | {s.name: s.shape for s in program.steps}
    table: dict[str, tuple[int, ...]] = {}
    for step in (s for s in program.steps if s.op in ("conv2d", "linear")):
        channels, out = before[step.inputs[0]][0], step.shape[0]
        shape = (channels, out)
        if step.op == "conv2d":
            if "kernel" not in step.attrs:
                raise ShoalError(f"found no kernel size at {step.name}; need it in the program; compile it again")
            shape = (*step.attrs["kernel"], channels // step.attrs["groups"], out)
        table |= {f"{step.name}.weight": shape, f"{step.name}.bias": (out,)}
    return table
