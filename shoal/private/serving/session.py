"""A session at one party: the control connection and, where needed, the SPU process, both watched."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from shoal.errors import ShoalError
from shoal.private.engine.worker import Worker
from shoal.private.program.artifact import SERVER_ADVICE
from shoal.private.transport.channel import Channel, ClosedError, first_ready

POLL_SECONDS = 0.25


class PeerError(ShoalError):
    """What a peer did wrong or may not have, in words that it may read: they say nothing that only this party knows."""


class RefusedError(PeerError):
    """The server refuses a client that did nothing wrong. `reason` is one word for the server's counters."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class SessionStoppedError(ShoalError):
    """This side ended the session."""


class TimedOutError(ShoalError):
    """The peer or the SPU process did not answer in time."""


class EngineError(ShoalError):
    """The SPU process died or reported a failure."""


class Session:
    """A control channel and, once started, an SPU process with its connection. If any of them ends, the session ends.

    The event `stopped` ends the session at once; `closing` ends it when it waits for the peer's next order.
    """

    def __init__(self, control: Channel, stopped: threading.Event, closing: threading.Event | None = None) -> None:
        self.control, self.stopped, self.closing = control, stopped, closing or stopped
        self.idle = self.handed_over = False
        self.worker: Worker | None = None
        self.inbox: list[tuple[dict[str, Any], bytes]] = []
        self.payload = b""

    def start(self, order: dict[str, Any]) -> None:
        """Start the SPU process with `order`."""
        self.worker = Worker(order)

    def carry(self, link: Channel) -> None:
        """Carry the connection of the SPU process over `link`, until the session ends."""
        assert self.worker is not None
        self.worker.carry(link)

    def order(self, message: dict[str, Any], payload: bytes = b"") -> None:
        """Send the SPU process an order."""
        assert self.worker is not None
        self.worker.channel.send(message, payload)

    def from_peer(self, kinds: tuple[str, ...], seconds: float) -> dict[str, Any]:
        """The peer's next message; sets `payload` to its raw bytes. Raises ShoalError unless its type is in `kinds`."""
        limit = time.monotonic() + seconds
        while not self.inbox:
            self._step(limit)
        message, self.payload = self.inbox.pop(0)
        if message["type"] not in kinds:
            raise ShoalError(f"found message {message['type'][:40]!r} from {self.control.name}; need {kinds[0]!r}")
        return message

    def next_order(self, kinds: tuple[str, ...], seconds: float) -> dict[str, Any]:
        """As `from_peer`, between two tasks: here a party that is closing may end the session."""
        self.idle = True
        message = self.from_peer(kinds, seconds)
        self.idle = False
        return message

    def check(self) -> None:
        """Raise the peer's error if it has ended the session meanwhile. Call it before asking for more."""
        while self.control.pending() or first_ready([self.control], 0) is not None:
            self._keep(*self.control.receive())

    def from_worker(self, seconds: float) -> tuple[dict[str, Any], bytes]:
        """The SPU process's next message. Messages of the peer that arrive meanwhile are kept."""
        limit = time.monotonic() + seconds
        while True:
            found = self._step(limit)
            if found is not None:
                return found

    def until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Wait until `holds`. The SPU process has nothing to say yet but errors; messages of the peer are kept."""
        limit = time.monotonic() + seconds
        while not holds():
            self._step(limit)

    def _step(self, limit: float) -> tuple[dict[str, Any], bytes] | None:
        """Wait a moment for a message. Returns one of the SPU process; keeps one of the peer."""
        if self.stopped.is_set() or (self.idle and self.closing.is_set()):
            raise SessionStoppedError("found the session stopped from this side; need it open; connect again")
        if time.monotonic() > limit:
            raise TimedOutError(f"found no answer from {self.control.name} in time; need a live peer; raise timeout_s")
        ends = [self.control] if self.worker is None else [self.worker.channel, self.control]
        ready = first_ready(ends, POLL_SECONDS)
        if ready is None:
            self._check_tunnel()
            return None
        if ready is self.control:
            self._keep(*self.control.receive())
            return None
        return self._worker_says()

    def _keep(self, message: dict[str, Any], payload: bytes) -> None:
        if message["type"] == "error":
            raise ShoalError(printable(message.get("message"), 600))
        if len(self.inbox) >= 4:
            raise ShoalError(f"found too many messages from {self.control.name}; need one at a time")
        self.inbox.append((message, payload))

    def _worker_says(self) -> tuple[dict[str, Any], bytes]:
        assert self.worker is not None
        try:
            message, payload = self.worker.channel.receive()
        except ClosedError as error:
            tail = self.worker.log_tail()
            raise EngineError(f"found the SPU process dead ({tail}); need it alive; look for lack of memory") from error
        if message["type"] == "error":
            # When the peer dies, SPU and the control connection report it at the same time; the latter says why.
            if first_ready([self.control], POLL_SECONDS):
                self._keep(*self.control.receive())
            self._check_tunnel()
            raise EngineError(message["message"])
        return message, payload

    def _check_tunnel(self) -> None:
        """Raise why SPU's connection has ended, unless the peer says more about it on the control connection."""
        if self.worker is None or self.worker.tunnel is None or not self.worker.tunnel.ended:
            return
        if first_ready([self.control], POLL_SECONDS) is None:
            self.worker.tunnel.check()

    def end(self, farewell: dict[str, Any] | None = None) -> None:
        """Send `farewell` if the peer still listens, end the SPU process, and close the connection."""
        if farewell is not None:
            with contextlib.suppress(ShoalError, OSError):  # a server that ends may have closed it already
                self.control.send(farewell)
        if self.worker is not None:
            self.worker.end()
        if not self.handed_over:
            self.control.close()


def compare(client: object, server: object) -> None:
    """Raise PeerError unless both parties' terms are equal. The error names the first that differs."""
    if not isinstance(client, dict) or not isinstance(server, dict):
        raise PeerError("found a peer that states no terms; need a shoal party there; mend the address")
    for name in sorted(client.keys() | server.keys(), key=_rank_of_term):
        mine, theirs = client.get(name), server.get(name)
        if mine != theirs or type(mine) is not type(theirs):
            raise PeerError(
                f"found {printable(name, 40)} {printable(mine, 80)} at the client and {printable(theirs, 80)} at "
                f"the server; need the same at both; {SERVER_ADVICE.get(name, 'copy the client half again')}"
            )


def _rank_of_term(name: object) -> tuple[int, str]:
    order = ["artifact", "spu", "jax", "protocol", "digest"]
    return (order.index(name) if isinstance(name, str) and name in order else len(order), str(name))


def whole(message: dict[str, Any], name: str, most: int) -> int:
    """The whole number `name` in a peer's message. Raises PeerError unless it is from 1 to `most`."""
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise PeerError(f"found {name} {printable(value, 40)} from the peer; need a whole number from 1 to {most}")
    return value


def printable(value: object, most: int) -> str:
    """Text from a peer, made safe to show: without control characters, and cut to `most` characters."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= most else text[:most] + "..."
