"""Threads that take turns, so that a load on the machine slows all that is compared in them alike."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """The turns of `count` threads, numbered from 0, in a circle. A thread that ends must leave."""

    def __init__(self, count: int) -> None:
        self._circle = deque(range(count))
        self._changed = threading.Condition()

    def take(self, number: int) -> bool:
        """Wait for the turn of thread `number`; returns True, so that it can be a `proceed` of a preparation."""
        with self._changed:
            self._changed.wait_for(lambda: self._circle[0] == number)
        return True

    def end(self, number: int) -> None:
        """Pass the turn of thread `number` on, if it has it."""
        with self._changed:
            if self._circle[0] == number:
                self._circle.rotate(-1)
            self._changed.notify_all()

    def leave(self, number: int) -> None:
        """Take thread `number` out of the circle."""
        with self._changed:
            self._circle.remove(number)
            self._changed.notify_all()
