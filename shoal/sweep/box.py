"""A sweep's time limit: how long a worker that starts now may train, and when running workers must end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from shoal.errors import ShoalError

STARTING = 10.0
"""Seconds from a process's start to its first step: PyTorch and the data. 5 to 7 were measured on two busy cores."""
ENDING = 5.0
"""Seconds from a request to stop to a process's end: its current step, a checkpoint, and unloading PyTorch."""
WORTH = 10.0
"""Least seconds of training that are worth a start; with less, more time would go into starts than into training."""
GRACE = 60.0
"""Seconds after the limit until running workers are killed; a run's last evaluation has no checkpoint to stop at."""
SHORTEST = STARTING + WORTH + ENDING
"""Shortest limit of a sweep, in seconds."""


class Box:
    """The time limit of a sweep, in seconds from now; None is no limit. `now` is a clock in seconds.

    Raises ShoalError when the limit is too short to start a run.
    """

    def __init__(self, seconds: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        if seconds is not None and not seconds >= SHORTEST:
            raise ShoalError(
                f"found --max-seconds {seconds:g} for a sweep; need {SHORTEST:g} or more to start a run: "
                f"{STARTING:g} to start it, {WORTH:g} to train, {ENDING:g} to stop; give it more, or leave it out"
            )
        self.now, self.end = now, math.inf if seconds is None else now() + seconds

    def grant(self) -> float:
        """Seconds that a worker which starts now may train; 0 if too few are left, infinite without a limit."""
        seconds = self.end - self.now() - STARTING - ENDING
        return seconds if seconds >= WORTH else 0.0

    def asked(self) -> int:
        """0 while time is left, 1 when workers must stop at their next checkpoint, 2 when they must be killed."""
        left = self.end - self.now()
        return (left <= ENDING) + (left <= -GRACE)
