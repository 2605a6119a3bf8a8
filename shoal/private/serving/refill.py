"""Keeps a client's pool filled: in a thread between its queries, or in a process of its own.

Both parties make items together, at the client's request. After a failure it waits, longer each time, and tries again;
meanwhile queries use the items that are ready.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from shoal.errors import ShoalError

LOG = logging.getLogger("shoal.private.serving.refill")
POLL_SECONDS = 1.0
QUIET_SECONDS = 10.0
"""Seconds to wait, between two batches, for queries to end before the server's SPU process is released."""
Proceed = Callable[[], bool]
"""Asked between two batches: whether to make another."""


class Backoff:
    """How long to wait after consecutive failures: `first` seconds, then twice that, and so on up to `most`."""

    def __init__(self, first: float = 1.0, most: float = 60.0) -> None:
        self.first, self.most = first, most
        self.failures = 0

    def failed(self, error: Exception) -> float:
        """Log a failure and return the seconds to wait before the next attempt."""
        wait = min(self.most, self.first * 2.0 ** min(self.failures, 30))
        self.failures += 1
        facts = {"event": "refill_failed", "retry_s": wait}
        LOG.warning("no items made: %s; trying again in %g s", error, wait, extra={"facts": facts})
        return wait


class Refill:
    """A thread that fills a pool up to `keep` items while no query runs, or while a query waits for an item.

    `ready` returns the number of ready items. `top_up` makes missing items; between two batches it asks its argument
    whether to go on. `error` is the last failure, None after a success. `backoff` sets the waits after failures.
    """

    def __init__(self, keep: int, ready: Callable[[], int], top_up: Callable[[Proceed], object]) -> None:
        self.keep, self.ready, self.top_up = keep, ready, top_up
        self.error: ShoalError | None = None
        self.backoff = Backoff()
        self._turn = threading.Condition()
        self._querying = self._starved = self._asked = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="shoal-refill", daemon=True)

    def start(self) -> None:
        """Start the thread. Call it once."""
        self._thread.start()

    def close(self, wait_s: float = 2.0) -> None:
        """End the thread, waiting at most `wait_s` seconds: it may still be trying to reach an absent server."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        self._thread.join(wait_s)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A query runs within this block, so no batch begins."""
        with self._turn:
            self._querying += 1
        try:
            yield
        finally:
            with self._turn:
                self._querying -= 1
                self._turn.notify_all()

    def await_item(self, seconds: float) -> None:
        """Return when an item is ready, when making one failed, or after `seconds`."""
        with self._turn:
            self._starved, self._asked, failures = self._starved + 1, self._asked + 1, self.backoff.failures
            self._turn.notify_all()
            self._turn.wait_for(lambda: self.ready() > 0 or self.backoff.failures > failures or self._closed, seconds)
            self._starved -= 1

    def proceed(self) -> bool:
        """Between two batches: wait for queries to end; returns whether to make another batch."""
        with self._turn:
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._closed or self._free(), QUIET_SECONDS)
            return self._free() and not self._closed

    def _free(self) -> bool:
        return self._querying == 0 or self._starved > 0

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self.top_up(self.proceed)
            except (ShoalError, OSError) as error:
                self._failed(error)
            else:
                self._succeeded()

    def _wait_for_work(self) -> bool:
        """Wait until items are missing and may be made. Returns False once the thread must end."""
        with self._turn:
            while not self._closed and not (self._free() and self.ready() < self.keep):
                self._turn.wait(POLL_SECONDS)
            return not self._closed

    def _failed(self, error: Exception) -> None:
        with self._turn:
            if not self._closed:  # closing interrupts a batch, which is no failure
                self.error = error if isinstance(error, ShoalError) else ShoalError(str(error))
                self._turn.notify_all()
                wait, asked = self.backoff.failed(error), self._asked
                self._turn.wait_for(lambda: self._closed or self._asked > asked, wait)

    def _succeeded(self) -> None:
        with self._turn:
            self.error, self.backoff.failures = None, 0
            self._turn.notify_all()
