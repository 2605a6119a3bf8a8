"""Presets of *Making Models Shallow Again*: schedules and loss weights by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from shoal.training.schedule import Schedule


@dataclass(frozen=True)
class Preset:
    """Schedules of the teacher and of the three stages, and loss weights."""

    teacher: Schedule
    sensitivity: Schedule
    mask: Schedule
    finetune: Schedule
    mask_ce: float = 0.5
    mask_kd: float = 0.5
    kd_weight: float = 0.9
    temperature: float = 4.0
    beta: float = 1000.0
    pram_form: str = "paper"
    pram_sites: str = "all"
    select: str = "val"
    student_from_teacher: bool = True
    mask_score: str = "counterfactual"
    rewirings: int = 0
    """Least number of rewirings in stage 1. Each epoch has one, or more if this number needs it."""

    @property
    def begins_learned(self) -> bool:
        """Whether the mask search starts with masks computed from the teacher. Otherwise they are random."""
        return self.student_from_teacher and self.mask_score == "counterfactual"


def quick(teacher: int = 12, sensitivity: int = 2, mask: int = 6, finetune: int = 16, batch: int = 64) -> Preset:
    """Short cosine schedules for small data; the mask search starts from the teacher's weights."""

    def cosine(epochs: int, lr: float, drop: tuple[int, ...] = ()) -> Schedule:
        return Schedule(epochs, lr, drop, kind="cosine", warmup=0.5, batch_size=batch)

    return Preset(
        cosine(teacher, 0.1),
        cosine(sensitivity, 0.05),
        cosine(mask, 0.02),
        cosine(finetune, 0.03, (max(1, finetune // 3),)),
        beta=1.0,
        rewirings=16,
    )


def paper() -> Preset:
    """Section 5.1, with stages 1 and 2 (SENet) as in the follow-up code of SENet's authors."""
    decay = (150, 180, 210)
    return Preset(
        Schedule(240, 0.05, decay),
        Schedule(30, 0.05, decay),
        Schedule(150, 0.05, decay),
        Schedule(180, 0.01, (90, 140, 160)),
        student_from_teacher=False,
        mask_score="published",
    )


def reference_code() -> Preset:
    """`paper` with the differences of the SENet group's public code (see docs/papers/shallow.md).

    PRAM by attention transfer at the four stage outputs, 240 fine-tuning epochs, and selection on the test set.
    """
    return replace(
        paper(),
        finetune=Schedule(240, 0.01, (150, 180, 210)),
        pram_form="attention-transfer",
        pram_sites="stages",
        select="test",
    )


PRESETS: dict[str, Callable[[], Preset]] = {"quick": quick, "paper": paper, "reference-code": reference_code}
