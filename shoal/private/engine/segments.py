"""A Program split into segments, each of which is one SPU executable; and its shapes in SPU's order.

SPU convolves NHWC values with HWIO kernels, so values are in (H, W, C) order there, and public positions are converted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shoal.errors import ShoalError
from shoal.private.program.program import Program
from shoal.private.program.steps import Step


@dataclass(frozen=True)
class Segment:
    """Consecutive steps that form one SPU executable: one ReLU, or steps without any."""

    kind: str
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the weights and biases that its steps read."""
        owners = [s.name for s in self.steps if s.op in ("conv2d", "linear")]
        return tuple(f"{name}.{part}" for name in owners for part in ("weight", "bias"))


def split(program: Program) -> tuple[Segment, ...]:
    """The segments of a program in order: each ReLU alone, and the steps between two ReLUs together."""
    groups: list[list[Step]] = []
    for step in program.steps:
        if not groups or step.op == "relu" or groups[-1][-1].op == "relu":
            groups.append([])
        groups[-1].append(step)
    segments = []
    for i, group in enumerate(groups):
        made = [step.name for step in group]
        read = {name for step in group for name in step.inputs}
        later = {name for other in groups[i + 1 :] for step in other for name in step.inputs} | set(program.outputs)
        kind = "relu" if group[0].op == "relu" else "linear"
        outputs = tuple(name for name in made if name in later)
        segments.append(Segment(kind, tuple(group), tuple(sorted(read - set(made))), outputs))
    # A segment whose results nobody reads would be an executable without a result.
    return tuple(s for s in segments if s.outputs)


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


def flat_positions(program: Program, step: Step) -> np.ndarray | None:
    """Sorted flat positions of the kept ReLUs in (H, W, C) order; None if all are kept."""
    kept = program.keep.get(step.name)
    if kept is None or len(kept) == math.prod(step.shape):
        return None
    if len(step.shape) != 3:
        return np.sort(kept).astype(np.int32)
    c, h, w = np.unravel_index(kept, step.shape)
    return np.sort((h * step.shape[2] + w) * step.shape[0] + c).astype(np.int32)
