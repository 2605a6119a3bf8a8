"""Repeated measurements: how much seconds vary, and when to measure again because other work disturbed them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WIDE = 0.25
"""A spread from which a measurement is repeated, as a fraction of the median."""
ROUNDS = 2
"""Most rounds of one measurement."""


def spread(seconds: Sequence[float]) -> float:
    """The interquartile range of `seconds` as a fraction of their median; with fewer than four of them, their range."""
    middle = statistics.median(seconds)
    if len(seconds) < 4:
        return (max(seconds) - min(seconds)) / middle if middle else 0.0
    low, _, high = statistics.quantiles(seconds, n=4)
    return (high - low) / middle if middle else 0.0


@dataclass(frozen=True)
class Repeated:
    """The round of a measurement with the least spread: its seconds, their spread, and the number of rounds made."""

    seconds: tuple[float, ...]
    spread: float
    rounds: int

    @property
    def median(self) -> float:
        """The median of the round's seconds."""
        return statistics.median(self.seconds)


def repeated(measure: Callable[[], Sequence[float]], most: int = ROUNDS) -> Repeated:
    """Call `measure`, which returns seconds, until their spread is at most `WIDE`, at most `most` times."""
    rounds: list[tuple[float, tuple[float, ...]]] = []
    while len(rounds) < most and not (rounds and rounds[-1][0] <= WIDE):
        seconds = tuple(measure())
        rounds.append((spread(seconds), seconds))
    least, seconds = min(rounds)
    return Repeated(seconds, least, len(rounds))


class Laps:
    """Seconds between calls of `lap`. The first call ends a lap that is not counted, such as one with a set-up."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def lap(self, *_: object) -> None:
        """End a lap now."""
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        """The seconds of the counted laps."""
        return [later - earlier for earlier, later in zip(self.ends, self.ends[1:], strict=False)]

    def are_few(self) -> bool:
        """Whether another lap is needed: fewer than two were counted, or they differ widely."""
        return len(self.seconds) < 2 or spread(self.seconds) > WIDE

    @property
    def fastest(self) -> int:
        """The number of the fastest counted lap, from 0."""
        return self.seconds.index(min(self.seconds))


def busy(spreads: Mapping[str, float]) -> str | None:
    """A sentence that says the machine is busy, if a spread is still wide after all rounds; otherwise None."""
    wide = {name: value for name, value in spreads.items() if value > WIDE}
    if not wide:
        return None
    worst = max(wide, key=lambda name: wide[name])
    return (
        f"found a busy machine: {len(wide)} of {len(spreads)} measurements still vary after {ROUNDS} rounds, {worst!r} "
        f"by {100 * wide[worst]:.0f} % of its median (load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} "
        "cores); need an idle one for forecasts to be right; end other work and calibrate again"
    )
