"""One time limit over several stages of training."""

from __future__ import annotations

import time


class Clock:
    """The seconds that several fits may take together, from now on; None is no limit.

    Each stops at a checkpoint: before an epoch that would not end in time. The first epoch of all always runs, so
    that repeated calls get on.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit, self.begun, self.longest = limit, time.monotonic(), 0.0

    def lap(self, seconds: float) -> None:
        """Note how long an epoch took."""
        self.longest = max(self.longest, seconds)

    @property
    def is_up(self) -> bool:
        """Whether one more epoch, as long as the longest so far, would end too late."""
        expected = time.monotonic() - self.begun + self.longest
        return self.limit is not None and self.longest > 0 and expected > self.limit
