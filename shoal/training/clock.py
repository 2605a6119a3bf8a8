"""One time limit for several stages of training."""

from __future__ import annotations

import time
from collections import deque

RECENT = 16
"""Number of recent laps that predict the next one. The first lap may take longer, for compiling or warming up."""


class Clock:
    """A time limit in seconds, from now on, that several fits share; None is no limit.

    Work is divided into laps of different kinds: steps, the evaluation of an epoch, saving. A lap starts only if the
    longest recent lap of its kind, plus a checkpoint, would end in time. The very first lap always runs, so that
    repeated calls make progress.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit, self.begun = limit, time.monotonic()
        self.laps: dict[str, deque[float]] = {}

    def lap(self, kind: str, seconds: float) -> None:
        """Record the seconds that a lap took."""
        self.laps.setdefault(kind, deque(maxlen=RECENT)).append(seconds)

    def has_time_for(self, kind: str) -> bool:
        """Whether a lap of this kind and a checkpoint after it would end in time."""
        if self.limit is None or not self.laps:
            return True
        needed = sum(max(self.laps.get(name, [0.0])) for name in (kind, "save"))
        return time.monotonic() - self.begun + needed <= self.limit
