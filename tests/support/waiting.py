"""How tests wait: for an event, never for a clock. The one limit here ends a test that hangs."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG = 600.0
"""Seconds after which a test counts as hung: many times what the slowest machine needs for the longest wait."""
POLL = 0.02
"""Seconds between two looks."""


def eventually(holds: Callable[[], object], limit: float = HANG) -> bool:
    """Whether `holds` becomes true; False only after `limit` seconds."""
    end = time.monotonic() + limit
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(POLL)
    return True
