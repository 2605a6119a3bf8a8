"""The item of the next query, read and expanded before that query comes."""

from __future__ import annotations

import contextlib
import threading

from shoal.errors import ShoalError
from shoal.private.protocol.pool import Pool
from shoal.private.protocol.randomness import Half


class Ahead:
    """At most one item of `pool` in memory, for the next query of a session.

    An item that is only read stays on disk, and ready: if no query comes, nothing is lost. A claimed item is lost then.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.name: str | None = None
        self.claimed = False
        self._half: Half | None = None

    def fetch(self, name: object, claim: bool) -> None:
        """Read an item and, with `claim`, claim it.

        Raises ShoalError when it cannot be claimed, and when another one is already claimed ahead.
        """
        if self.claimed:
            raise ShoalError(f"found item {self.name} claimed ahead already; need one at a time; query with it first")
        if claim:
            self._half = self.pool.claim(name, self._read(name))
            self.name, self.claimed = str(name), True
        else:
            with contextlib.suppress(ShoalError):  # the claim reads it again, and says what is wrong
                self._half = self.pool.look(name)
                self.name = str(name)

    def take(self, name: object) -> Half:
        """The item, claimed. Raises ShoalError as `Pool.claim` does."""
        half, claimed = self._read(name), self.claimed
        self.name, self.claimed, self._half = None, False, None
        return half if half is not None and claimed else self.pool.claim(name, half)

    def _read(self, name: object) -> Half | None:
        return self._half if name == self.name else None


class Background:
    """An `Ahead` at the client, filled by a thread while the program does other things between two queries.

    From the request that lets the server claim the next item until that item's own query, agreements of other sessions
    keep the half that the server or this party may not have claimed yet.
    """

    def __init__(self, pool: Pool) -> None:
        self.ahead = Ahead(pool)
        self._asked: str | None = None
        self._thread: threading.Thread | None = None
        self._error: ShoalError | None = None

    def next_name(self, besides: str | None = None) -> str | None:
        """The name of the item that the next query takes, or the one after it, which is not `besides`."""
        if besides is None and self.ahead.claimed:
            return self.ahead.name
        return next((name for name in self.ahead.pool.names() if name != besides), None)

    def ask(self, name: str) -> None:
        """Call this before the server hears that it may claim `name` ahead."""
        self.ahead.pool.asked.add(name)  # until its own query, which ends with the server's answer that it has it
        self._asked = name

    def start(self, name: str, claim: bool) -> None:
        """Begin to fetch an item."""
        self._thread = threading.Thread(target=self._fetch, args=(name, claim), daemon=True)
        self._thread.start()

    def _fetch(self, name: str, claim: bool) -> None:
        try:
            self.ahead.fetch(name, claim)
        except ShoalError as error:
            self._error = error

    def wait(self) -> None:
        """Wait until the item is there. Raises the error of the thread."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def end(self) -> None:
        """The session ends: forget the item. One that was claimed is lost."""
        with contextlib.suppress(ShoalError):
            self.wait()
        if self._asked is not None:
            self.ahead.pool.asked.discard(self._asked)
