"""A sweep's time box: for how long a worker that starts now may train, and when those that still run are to end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from shoal.errors import ShoalError

STARTING = 10.0
"""Seconds from a process's start to its first step: PyTorch and the data. 5 to 7 were measured on two busy cores."""
ENDING = 5.0
"""Seconds from a stop to a process's end: the step that it is in, a checkpoint, and letting go of PyTorch."""
WORTH = 10.0
"""Seconds of training that are worth a start: less than a start itself takes would be spent on starts."""
GRACE = 60.0
"""Seconds after the box when what still runs is killed: a run's last evaluation has no checkpoint to stop at."""
SHORTEST = STARTING + WORTH + ENDING


class Box:
    """The seconds that a sweep may take from now on; None is no limit. `now` is a clock in seconds.

    Raises ShoalError for a box in which no run would be started.
    """

    def __init__(self, seconds: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        if seconds is not None and not seconds >= SHORTEST:
            raise ShoalError(
                f"found --max-seconds {seconds:g} for a sweep; need {SHORTEST:g} or more, or no run is started: "
                f"{STARTING:g} to start it, {WORTH:g} to train, {ENDING:g} to stop; give it more, or leave it out"
            )
        self.now, self.end = now, math.inf if seconds is None else now() + seconds

    def grant(self) -> float:
        """Seconds of training for a worker that starts now; 0 when too few are left, infinite without a limit."""
        seconds = self.end - self.now() - STARTING - ENDING
        return seconds if seconds >= WORTH else 0.0

    def asked(self) -> int:
        """As `Sweep.run` counts it: 1 when workers must stop at their next checkpoint, 2 when they must be killed."""
        left = self.end - self.now()
        return (left <= ENDING) + (left <= -GRACE)
