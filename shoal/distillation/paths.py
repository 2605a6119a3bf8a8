"""Which classifiers of one network teach which: the paths of self-distillation and in-place distillation.

The four paths of *Self-Distillation* (TPAMI'21, section 3.3) and the losses of *In-place distillation with teacher
assistants* (eq. 5 to 7) both choose teachers for each classifier. IPKD is ``deepest``, IPKD-TA-1 is ``transitive``, and
IPKD-TA-M is ``dense``, the mean over all stronger classifiers. ``dense-sum`` is their sum, as in eq. 6 of
*Self-Distillation*.
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
"""Maps each student, an exit counted from 0 (the weakest), to its teachers and their weights. A student's weights add
up to 1, except for ``dense-sum``."""


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
    """The teachers of each of `count` classifiers that is a student.

    Raises ShoalError for an unknown path or fewer than two classifiers.
    """
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
    """The sum over students of the weighted divergence from their teachers. No gradient reaches a teacher.

    ``ensemble`` has one teacher, the mean of all logits; in the other paths, each divergence has its own weight (IPKD
    eq. 7). `squared` multiplies by the squared temperature. Raises ShoalError as `lessons` does.
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
    """Batch mean of the squared L2 distance between features [N, D] (*Self-Distillation*, eq. 4)."""
    return (student - teacher).square().sum(1).mean()


def batch_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The L2 norm (not squared) of the difference of the whole batch [N, D]: eq. 4 in the public code."""
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
    """The sum over students of the distance between their features [N, D] and those of their teachers.

    `taps` name each classifier's features, weakest first. A student in `adapted` is compared by the output of that
    submodule instead; one in `skipped` learns no features. Both count exits from 0. No gradient reaches a teacher.
    Raises ShoalError for an unknown path or form, and when no student is left.
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
