"""One time limit over several stages of training."""

from __future__ import annotations

import time
from collections import deque

RECENT = 16
"""As many laps of a kind as its next one is judged by: the first of all may take long, to compile or to warm up."""


class Clock:
    """The seconds that several fits may take together, from now on; None is no limit.

    Work is done in laps of different kinds: steps, the judgement of an epoch, saving. A lap begins only when the
    longest recent one of its kind, and a checkpoint after it, would end in time. The first lap of all always runs, so
    that repeated calls get on.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit, self.begun = limit, time.monotonic()
        self.laps: dict[str, deque[float]] = {}

    def lap(self, kind: str, seconds: float) -> None:
        """Note how long a lap took."""
        self.laps.setdefault(kind, deque(maxlen=RECENT)).append(seconds)

    def has_time_for(self, kind: str) -> bool:
        """Whether a lap of this kind and a checkpoint would end in time."""
        if self.limit is None or not self.laps:
            return True
        needed = sum(max(self.laps.get(name, [0.0])) for name in (kind, "save"))
        return time.monotonic() - self.begun + needed <= self.limit
