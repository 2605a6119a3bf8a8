"""What one client may take of a server: connections and sessions, and turns at the SPU processes."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from shoal.private.serving.session import RefusedError

GREETING_SECONDS = 5.0
"""Seconds from the start of a connection to its first valid message."""
SILENT = 64
"""Connections at once that have sent no valid message yet; for one more, the oldest of them is closed."""
SILENT_OF_ADDRESS = 16
"""The same, of one address."""
TURN_SECONDS = 60.0
"""Seconds for which a session keeps an SPU process although a client with another certificate waits for one."""


@dataclass(eq=False)
class Connection:
    """A client's connection at a server. `line` is a second descriptor of its socket, by which it can be closed.

    `identity` is the client's certificate once its session began. `cut` says why the server closed the connection.
    """

    line: socket.socket
    host: str
    since: float
    greeted: bool = False
    identity: str | None = None
    cut: str = ""

    def close(self, reason: str) -> None:
        """Close the connection, whoever waits for it, and keep the reason."""
        self.cut = reason
        with contextlib.suppress(OSError):
            self.line.shutdown(socket.SHUT_RDWR)


class Connections:
    """All connections of a server. At most `most` are sessions, and at most `most_each` of them of one certificate.

    Connections that have not greeted do not count as sessions: anybody can open them. There are at most `SILENT` of
    them, and at most `SILENT_OF_ADDRESS` from one address, each for at most `GREETING_SECONDS`. A new one is always
    let in, and the oldest beyond these limits are closed: a shoal client greets within milliseconds.
    """

    def __init__(self, most: int, most_each: int) -> None:
        self.most, self.most_each = most, most_each
        self._guard = threading.Lock()
        self._all: list[Connection] = []

    def enter(self, sock: socket.socket, host: str) -> Connection:
        """Let a connection from `host` in, and close older ones that are silent and beyond a limit."""
        new = Connection(sock.dup(), host, time.monotonic())
        with self._guard:
            silent = [c for c in self._all if not c.greeted and not c.cut]
            for beyond in _beyond([*silent, new]):
                beyond.close(
                    f"found {SILENT} silent connections at the server, or {SILENT_OF_ADDRESS} from one address"
                )
            self._all.append(new)
        return new

    def expire(self) -> None:
        """Close the connections that have been silent for too long."""
        limit = time.monotonic() - GREETING_SECONDS
        with self._guard:
            for late in (c for c in self._all if not c.greeted and not c.cut and c.since < limit):
                late.close(f"found a connection without a valid message after {GREETING_SECONDS:g} s")

    def greet(self, connection: Connection) -> None:
        """The connection's first valid message has arrived."""
        with self._guard:
            connection.greeted = True

    def begin(self, connection: Connection, identity: str) -> None:
        """The connection becomes a session of this certificate. Raises RefusedError beyond the limits."""
        with self._guard:
            sessions = [c.identity for c in self._all if c.identity is not None]
            if len(sessions) >= self.most:
                raise RefusedError(f"found {self.most} clients at the server; need fewer; try again later", "clients")
            if sessions.count(identity) >= self.most_each:
                raise RefusedError(
                    f"found {self.most_each} sessions of this certificate at the server; need fewer for one more; end "
                    "one or try again later",
                    "certificate",
                )
            connection.identity = identity

    def leave(self, connection: Connection) -> None:
        """The connection has ended."""
        with self._guard:
            self._all.remove(connection)
        connection.line.close()


def _beyond(silent: list[Connection]) -> Iterator[Connection]:
    """Those of `silent`, oldest first, that must be closed: of the address with the most, its oldest."""
    while True:
        host, count = Counter(c.host for c in silent).most_common(1)[0]
        if len(silent) <= SILENT and count <= SILENT_OF_ADDRESS:
            return
        oldest = next(c for c in silent if c.host == host)
        silent.remove(oldest)
        yield oldest


class Place:
    """A session's place in the queue for an SPU process of `engines`, and then its turn."""

    def __init__(self, engines: Engines, identity: str) -> None:
        self.engines, self.identity = engines, identity
        self.since: float | None = None

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds`; returns whether the turn has begun."""
        return self.engines.wait(self, seconds)

    def over(self) -> bool:
        """Whether the turn should end: it has lasted `TURN_SECONDS`, and another certificate's client waits."""
        late = self.since is not None and time.monotonic() - self.since > TURN_SECONDS
        return late and self.engines.wanted(self.identity)


class Engines:
    """The `count` SPU processes that a server runs at once, shared between certificates.

    A certificate gets all but one of them (one, if there is only one). Of those who wait, the next turn goes to the
    certificate that has the fewest now, then to the one whose last turn began longest ago, then to who came first.
    """

    def __init__(self, count: int) -> None:
        self.count, self.most_each = count, max(1, count - 1)
        self._turn = threading.Condition()
        self._queue: list[Place] = []
        self._held: Counter[str] = Counter()
        self._last: dict[str, int] = {}
        self._turns = 0

    @contextlib.contextmanager
    def place(self, identity: str) -> Iterator[Place]:
        """A place in the queue. At the end of the block the place, or the SPU process, is free again."""
        place = Place(self, identity)
        with self._turn:
            self._queue.append(place)
            self._grant()
        try:
            yield place
        finally:
            with self._turn:
                if place.since is None:
                    self._queue.remove(place)
                else:
                    self._held[identity] -= 1
                self._grant()

    def wait(self, place: Place, seconds: float) -> bool:
        """See Place.wait."""
        with self._turn:
            return self._turn.wait_for(lambda: place.since is not None, seconds)

    def wanted(self, identity: str) -> bool:
        """Whether a client with another certificate waits."""
        with self._turn:
            return any(place.identity != identity for place in self._queue)

    def _grant(self) -> None:
        """Begin the turns that can begin now. The caller holds the lock."""
        while sum(self._held.values()) < self.count:
            able = [place for place in self._queue if self._held[place.identity] < self.most_each]
            if not able:
                break
            chosen = min(able, key=lambda p: (self._held[p.identity], self._last.get(p.identity, 0)))
            self._queue.remove(chosen)
            self._turns += 1
            self._held[chosen.identity] += 1
            self._last[chosen.identity], chosen.since = self._turns, time.monotonic()
        self._turn.notify_all()
