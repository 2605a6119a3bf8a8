"""A Program split into segments, each of which is one SPU executable."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

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


def flat_positions(program: Program, step: Step) -> np.ndarray | None:
    """Sorted flat positions of the kept ReLUs in (H, W, C) order; None if all are kept."""
    kept = program.keep.get(step.name)
    if kept is None or len(kept) == math.prod(step.shape):
        return None
    if len(step.shape) != 3:
        return np.sort(kept).astype(np.int32)
    c, h, w = np.unravel_index(kept, step.shape)
    return np.sort((h * step.shape[2] + w) * step.shape[0] + c).astype(np.int32)
