"""Counting of the signals SIGINT and SIGTERM, so that training can stop at its next checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Asked = Callable[[], int]
"""Returns the number of signals received so far."""


@contextmanager
def counting(*signals: signal.Signals, said: str, impatient: bool = False) -> Iterator[Asked]:
    """Count these signals within the block, so that they do not end the program; the first prints `said` on stderr.

    With `impatient`, a second Ctrl-C (SIGINT) raises KeyboardInterrupt. Only the main thread can handle signals; in
    any other thread the count stays 0, and signals have their usual effect.
    """
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if len(arrived) == 1:
            os.write(2, f"shoal: {said}\n".encode())  # print is unsafe here: the signal may interrupt another print
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
    """Yield a function that returns whether SIGTERM (sent by schedulers) or Ctrl-C has arrived.

    Training calls it before each step and then stops at a checkpoint. A second Ctrl-C ends the program at once.
    """
    said = "stopping at a checkpoint; Ctrl-C again ends at once"
    with counting(signal.SIGINT, signal.SIGTERM, said=said, impatient=True) as asked:
        yield lambda: asked() > 0
