"""Signals that ask for an end, as a count to look at instead of an end at any line."""

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
def counting(*signals: signal.Signals, said: str) -> Iterator[Asked]:
    """Within the block the signals end nothing but are counted; the first one prints `said` on standard error.

    Only a program's main thread may handle signals: in any other one the count stays 0 and their effect as it was.
    """
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if len(arrived) == 1:
            os.write(2, f"shoal: {said}\n".encode())  # print is not safe where it may have been interrupted itself

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
def until_terminated() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM asks to stop at the next checkpoint, which is what schedulers send before they kill."""
    said = "told to stop (SIGTERM): stopping at a checkpoint; --resume goes on from there"
    with counting(signal.SIGTERM, said=said) as asked:
        yield lambda: asked() > 0
