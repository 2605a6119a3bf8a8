"""Number of epochs and learning rates of one stage of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from shoal.errors import ShoalError


@dataclass(frozen=True)
class Schedule:
    """Epochs and learning rates of one stage.

    `kind` ``step`` multiplies the rate by `gamma` at each of `milestones` (epochs); ``cosine`` anneals to 0 over all
    epochs, batch by batch. In the first `warmup` epochs, the rate rises linearly from 0.
    """

    epochs: int
    lr: float = 0.1
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    kind: str = "step"
    warmup: float = 0.0
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False

    def rate(self, epoch: float) -> float:
        """Learning rate at `epoch`, which may be fractional, counted from 0."""
        rise = min(1.0, epoch / self.warmup) if self.warmup else 1.0
        if self.kind == "cosine":
            return self.lr * rise * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.lr * rise * self.gamma ** sum(epoch >= m for m in self.milestones)

    @property
    def first_drop(self) -> int:
        """The epoch at which the rate first drops, where the ramp of the gates ends.

        Without milestones it is half of all epochs.
        """
        return min(self.milestones) if self.milestones else max(1, self.epochs // 2)


SCHEDULES: dict[str, Schedule] = {
    "self-distillation": Schedule(300, 0.1, (90, 180, 270)),
    "osakd": Schedule(100, 1e-3, batch_size=64, weight_decay=0.0),
    "osakd-resnet": Schedule(300, 0.1, (150, 225), batch_size=128, weight_decay=1e-4, nesterov=True),
}
"""Schedules of papers that train many methods alike, by name.

*Self-Distillation*, section 4.1 for CIFAR-100; OSAKD, sections IV.B and IV.C. The OSAKD paper states no weight decay
for its own CNNs. Batch size and weight decay for its ResNets are those of the public code of ONE and FFL.
"""

_TEXTS: dict[str, Callable[[str], Any]] = {
    "epochs": int,
    "lr": float,
    "milestones": lambda text: tuple(int(part) for part in text.split("/")),
    "gamma": float,
    "kind": str,
    "warmup": float,
    "batch_size": int,
    "momentum": float,
    "weight_decay": float,
    "nesterov": lambda text: {"true": True, "false": False}[text],
}
"""How the value of each field of a schedule is read from text."""


def parse_schedule(text: str) -> Schedule:
    """The schedule in text: a name in `SCHEDULES`, fields such as ``epochs=200,lr=0.1,milestones=100/150``, or both.

    A name comes first, and fields after it replace its own. Without a name, the number of epochs is needed, and fields
    that are not given have the defaults of `Schedule`. Raises ShoalError for other text and impossible values.
    """
    first, *others = text.split(",")
    if "=" in first:
        begun, given = None, [first, *others]
    elif first in SCHEDULES:
        begun, given = SCHEDULES[first], others
    else:
        raise ShoalError(
            f"found --schedule {text!r}; need one of {', '.join(SCHEDULES)}, or fields such as "
            "epochs=200,lr=0.1,milestones=100/150; correct it"
        )
    fields = dict(_field(part, text) for part in given)
    if begun is None and "epochs" not in fields:
        raise ShoalError(f"found no epochs in --schedule {text!r}; need their number; add epochs=200, say")
    made = replace(begun, **fields) if begun else Schedule(**fields)
    _check(made, text)
    return made


def _field(part: str, text: str) -> tuple[str, Any]:
    name, _, value = part.partition("=")
    try:
        return name, _TEXTS[name](value)
    except (KeyError, ValueError) as error:
        raise ShoalError(
            f"found {part!r} in --schedule {text!r}; need NAME=VALUE with a name of {', '.join(_TEXTS)}, epochs in "
            "milestones separated by /, and true or false for nesterov; correct it"
        ) from error


def _check(schedule: Schedule, text: str) -> None:
    """Raise ShoalError for a field of `schedule`, which was read from `text`, with an impossible value."""
    drops = schedule.milestones
    rules: tuple[tuple[str, bool, str], ...] = (
        ("epochs", schedule.epochs >= 1, "1 or more"),
        ("lr", 0 < schedule.lr < math.inf, "a number above 0"),
        ("milestones", all(a < b for a, b in zip((0, *drops), drops, strict=False)), "epochs of 1 or more that rise"),
        ("gamma", 0 < schedule.gamma < math.inf, "a number above 0"),
        ("kind", schedule.kind in ("step", "cosine"), "step or cosine"),
        ("warmup", 0 <= schedule.warmup < math.inf, "0 or more epochs"),
        ("batch_size", schedule.batch_size >= 1, "1 or more"),
        ("momentum", 0 <= schedule.momentum < 1, "0 or more and below 1"),
        ("weight_decay", 0 <= schedule.weight_decay < math.inf, "0 or more"),
        ("nesterov", not schedule.nesterov or schedule.momentum > 0, "a momentum above 0 with it"),
    )
    for name, good, need in rules:
        if not good:
            raise ShoalError(
                f"found {name} {getattr(schedule, name)!r} in --schedule {text!r}; need {need}; correct it"
            )


def ramp(epoch: float, until: float, kind: str = "linear") -> float:
    """The gate at `epoch`: it rises from 0 to 1 at `until`, then stays 1 (shallow section 4).

    `kind` is ``linear`` or ``cosine``. Raises ShoalError for another kind.
    """
    if kind not in ("linear", "cosine"):
        raise ShoalError(f"found ramp {kind!r}; need 'linear' or 'cosine'")
    part = min(1.0, epoch / until) if until > 0 else 1.0
    return part if kind == "linear" else 0.5 * (1 - math.cos(math.pi * part))
