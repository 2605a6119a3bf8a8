"""A Program cut into what SPU runs as one executable each, and its shapes in SPU's order.

SPU convolves NHWC with HWIO kernels, so values live in (H, W, C) order there and public positions are converted.
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
    """A run of steps that is one SPU executable: all its steps are ReLUs, or none is."""

    kind: str
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the server's values that its steps read."""
        owners = [s.name for s in self.steps if s.op in ("conv2d", "linear")]
        return tuple(f"{name}.{part}" for name in owners for part in ("weight", "bias"))


def split(program: Program) -> tuple[Segment, ...]:
    """The program as segments in order: each ReLU alone, and each maximal run of other steps."""
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
    # A run that nothing reads would be an executable without a result.
    return tuple(s for s in segments if s.outputs)


def channels_last(rank: int) -> tuple[int, ...]:
    """The transposition, after the batch, from (C, H, W) to (H, W, C); none for other ranks."""
    return (2, 3, 1) if rank == 3 else tuple(range(1, rank + 1))


def hwc(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(C, H, W) as (H, W, C); other shapes as they are."""
    return (*shape[1:], shape[0]) if len(shape) == 3 else shape


def layout(array: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO kernels, [out, in] -> [in, out] matrices, biases as they are."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def parameter_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Shapes of the server's values in SPU's order. Raises ShoalError where the program states no kernel size."""
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
    """Sorted positions of the kept ReLUs in this file's (H, W, C) order; None keeps all."""
    kept = program.keep.get(step.name)
    if kept is None or len(kept) == math.prod(step.shape):
        return None
    if len(step.shape) != 3:
        return np.sort(kept).astype(np.int32)
    c, h, w = np.unravel_index(kept, step.shape)
    return np.sort((h * step.shape[2] + w) * step.shape[0] + c).astype(np.int32)
