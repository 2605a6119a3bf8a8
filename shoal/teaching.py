"""Who teaches whom among the classifiers of one network: self-distillation's paths and in-place distillation.

The four paths of *Self-Distillation* (TPAMI'21, section 3.3) and the losses of *In-place distillation with teacher
assistants* (eq. 5 to 7) are one question. IPKD is ``deepest``, IPKD-TA-1 ``transitive`` and IPKD-TA-M ``dense``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shoal.distill import Term, kl_divergence
from shoal.errors import ShoalError
from shoal.outputs import Outputs

Lessons = Mapping[int, Mapping[int, float]]
"""For each student, an exit counted from 0 (the weakest), its teachers with weights that add up to 1."""


def _deepest(count: int) -> Lessons:
    return {i: {count - 1: 1.0} for i in range(count - 1)}


def _transitive(count: int) -> Lessons:
    return {i: {i + 1: 1.0} for i in range(count - 1)}


def _dense(count: int) -> Lessons:
    return {i: dict.fromkeys(range(i + 1, count), 1 / (count - 1 - i)) for i in range(count - 1)}


def _ensemble(count: int) -> Lessons:
    return {i: dict.fromkeys(range(count), 1 / count) for i in range(count - 1)}


PATHS: dict[str, Callable[[int], Lessons]] = {
    "deepest": _deepest,
    "ensemble": _ensemble,
    "transitive": _transitive,
    "dense": _dense,
}


def lessons(path: str, count: int) -> Lessons:
    """Each student's teachers among `count` classifiers. Raises ShoalError for an unknown path or fewer than two."""
    if path not in PATHS:
        raise ShoalError(f"found path {path!r}; need one of {', '.join(PATHS)}")
    if count < 2:
        raise ShoalError(f"found {count} classifiers; need two or more, of which one teaches; add exits")
    return PATHS[path](count)


def self_kd(
    path: str,
    count: int,
    weight: float = 1.0,
    temperature: float = 1.0,
    *,
    direction: str = "forward",
    squared: bool = True,
    name: str = "self_kd",
) -> Term:
    """The sum over students of the weighted divergence from their teachers, which learn nothing from it.

    ``ensemble`` is one teacher, the mean of all logits; with the other paths, weights are those of divergences (IPKD
    eq. 7). `squared` multiplies by the temperature squared. Raises ShoalError as `lessons` does.
    """
    table = lessons(path, count)
    factor = 1.0 if squared else temperature**-2

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        _check(student.logits, count)
        if path == "ensemble":
            mean = torch.stack([z.detach().float() for z in student.logits]).mean(0)
            parts = [kl_divergence(mean, student.logits[i], temperature, direction) for i in table]
        else:
            parts = [
                part * kl_divergence(student.logits[j], student.logits[i], temperature, direction)
                for i, row in table.items()
                for j, part in row.items()
            ]
        return factor * torch.stack(parts).sum()

    return Term(name, weight, loss)


def _check(logits: Sequence[Tensor], count: int) -> None:
    if len(logits) != count:
        raise ShoalError(f"found {len(logits)} classifiers; need the {count} that the objective was made for")
