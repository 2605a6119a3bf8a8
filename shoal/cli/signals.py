"""Signals that ask for an end, counted, so that work stops at a checkpoint and not at any line."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Asked = Callable[[], int]
"""How often an end has been asked for."""


@contextmanager
def counting(*signals: signal.Signals, said: str, impatient: bool = False) -> Iterator[Asked]:
    """Count the signals within the block instead of ending; the first one prints `said` on standard error.

    With `impatient`, a second Ctrl-C (SIGINT) raises KeyboardInterrupt. Only the main thread of a program can handle
    signals: in any other thread the count stays 0 and signals keep their effect.
    """
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if len(arrived) == 1:
            os.write(2, f"shoal: {said}\n".encode())  # print is not safe where it may have been interrupted itself
        elif impatient and number == signal.SIGINT:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield lambda: len(arrived)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def until_stopped() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGTERM, which schedulers send, or Ctrl-C has asked to stop.

    Training asks it before each step and stops with a checkpoint. A second Ctrl-C ends at once.
    """
    said = "stopping at a checkpoint; Ctrl-C again ends at once"
    with counting(signal.SIGINT, signal.SIGTERM, said=said, impatient=True) as asked:
        yield lambda: asked() > 0
