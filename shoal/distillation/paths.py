"""Who teaches whom among the classifiers of one network: self-distillation's paths and in-place distillation.

The four paths of *Self-Distillation* (TPAMI'21, section 3.3) and the losses of *In-place distillation with teacher
assistants* (eq. 5 to 7) are one question. IPKD is ``deepest``, IPKD-TA-1 ``transitive`` and IPKD-TA-M ``dense``, the
mean over all stronger classifiers; ``dense-sum`` is their sum, as *Self-Distillation*'s eq. 6 has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shoal.distillation.losses import kl_divergence
from shoal.errors import ShoalError
from shoal.outputs import Outputs
from shoal.training.objective import Term, Weight

Lessons = Mapping[int, Mapping[int, float]]
"""For each student, an exit counted from 0 (the weakest), its teachers with weights; they add up to 1 but for
``dense-sum``."""


def _deepest(count: int) -> Lessons:
    return {i: {count - 1: 1.0} for i in range(count - 1)}


def _transitive(count: int) -> Lessons:
    return {i: {i + 1: 1.0} for i in range(count - 1)}


def _dense(count: int) -> Lessons:
    return {i: dict.fromkeys(range(i + 1, count), 1 / (count - 1 - i)) for i in range(count - 1)}


def _ensemble(count: int) -> Lessons:
    return {i: dict.fromkeys(range(count), 1 / count) for i in range(count - 1)}


def _dense_sum(count: int) -> Lessons:
    return {i: dict.fromkeys(range(i + 1, count), 1.0) for i in range(count - 1)}


PATHS: dict[str, Callable[[int], Lessons]] = {
    "deepest": _deepest,
    "ensemble": _ensemble,
    "transitive": _transitive,
    "dense": _dense,
    "dense-sum": _dense_sum,
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
    weight: Weight = 1.0,
    temperature: float = 1.0,
    *,
    direction: str = "forward",
    squared: bool = True,
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

    return Term("self_kd", weight, loss)


def _check(logits: Sequence[Tensor], count: int) -> None:
    if len(logits) != count:
        raise ShoalError(f"found {len(logits)} classifiers; need the {count} that the objective was made for")


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the batch of the squared L2 distance of features [N, D] (*Self-Distillation*, eq. 4)."""
    return (student - teacher).square().sum(1).mean()


def batch_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The un-squared L2 norm of the whole batch's difference [N, D]: the public code's form of eq. 4."""
    # The square root's gradient is infinite at 0, where the features agree.
    return (student - teacher).square().sum().clamp_min(1e-12).sqrt()


DISTANCES = {"squared": squared_distance, "batch-norm": batch_distance}


def self_features(
    path: str,
    taps: Sequence[str],
    weight: Weight,
    *,
    form: str = "squared",
    adapted: Mapping[int, str] | None = None,
    skipped: Sequence[int] = (),
) -> Term:
    """The sum over students of the distance of their features [N, D] from their teachers', which learn nothing from it.

    `taps` name each classifier's features, weak to strong; a student in `adapted` shows its teachers the result of that
    submodule instead, and one in `skipped` (both by exits, from 0) learns no features. Raises ShoalError for an unknown
    path or form, and when no student is left.
    """
    if form not in DISTANCES:
        raise ShoalError(f"found feature distance {form!r}; need one of {', '.join(DISTANCES)}; choose one")
    shown = {i: (adapted or {}).get(i, taps[i]) for i in range(len(taps))}
    table = {i: row for i, row in lessons(path, len(taps)).items() if i not in skipped}
    if not table:
        raise ShoalError(f"found no student of features among {len(taps)} classifiers; need one; skip fewer")

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        known = [student.taps[tap].detach().float() for tap in taps]
        parts = []
        for i, row in table.items():
            own = student.taps[shown[i]].float()
            if path == "ensemble":
                parts.append(DISTANCES[form](own, torch.stack(known).mean(0)))
            else:
                parts += [part * DISTANCES[form](own, known[j]) for j, part in row.items()]
        return torch.stack(parts).sum()

    return Term("features", weight, loss, own=tuple(dict.fromkeys((*taps, *shown.values()))))
