"""Raw words between the two parties during a prepared inference.

Every message is a header (its number within the inference, its length in bytes) and uint64 words. Both parties run
the same steps, so each knows the number and length of the next message. Anything else ends the inference.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shoal.errors import ShoalError
from shoal.private.transport.channel import Channel, ClosedError, wait_for

HEADER = struct.Struct("<II")
HEADER_WORDS = 1
CHUNK = 1 << 18


@dataclass
class Traffic:
    """What went over a wire: bytes each way (headers included), messages both ways, one-way latencies in sequence."""

    sent: int = 0
    received: int = 0
    messages: int = 0
    latencies: int = 0


class Wire(Protocol):
    """The connection that a step of the protocol uses. All arrays are uint64."""

    traffic: Traffic

    def exchange(self, mine: np.ndarray) -> np.ndarray:
        """Send `mine` and receive as many words at the same time. Takes one one-way latency."""

    def send(self, mine: np.ndarray) -> None:
        """Send `mine`."""

    def receive(self, words: int) -> np.ndarray:
        """Receive `words` words. Takes one one-way latency."""


class SocketWire:
    """A Wire over a Channel's socket that waits at most `seconds` for each message.

    Raises ShoalError for an unexpected message, ClosedError for a peer that is gone or silent.
    """

    def __init__(self, channel: Channel, seconds: float) -> None:
        self.channel, self.sock, self.seconds = channel, channel.sock, seconds
        self.traffic = Traffic()
        self.turn = 0

    def exchange(self, mine: np.ndarray) -> np.ndarray:
        """See Wire."""
        return self._both(mine, mine.size)

    def send(self, mine: np.ndarray) -> None:
        """See Wire."""
        self._both(mine, 0)

    def receive(self, words: int) -> np.ndarray:
        """See Wire."""
        return self._both(None, words)

    def _both(self, mine: np.ndarray | None, words: int) -> np.ndarray:
        out, into = _framed(self.turn, mine), np.empty(words + HEADER_WORDS if words else 0, "<u8")
        try:
            _move(self.sock, out.data.cast("B"), into.data.cast("B"), time.monotonic() + self.seconds)
        except (OSError, ValueError) as error:
            raise ClosedError(
                f"found {self.channel.name} gone or silent in an inference ({error}); need it running; query again"
            ) from error
        if words and HEADER.unpack_from(into.data) != (self.turn, words * 8):
            number, size = HEADER.unpack_from(into.data)
            raise ShoalError(
                f"found message {number} of {size} bytes from {self.channel.name}; need message {self.turn} of "
                f"{words * 8}; use one artifact and one version of shoal at both"
            )
        self._count(out.nbytes, into.nbytes)
        return into[HEADER_WORDS:]

    def _count(self, sent: int, received: int) -> None:
        self.turn += 1
        self.traffic.sent += sent
        self.traffic.received += received
        self.traffic.messages += (sent > 0) + (received > 0)
        # For a message one way, the receiver waits for it and the sender waits for what follows.
        self.traffic.latencies += 1


def _framed(turn: int, mine: np.ndarray | None) -> np.ndarray:
    """A message as it goes over the wire: header and words, as uint64; nothing if `mine` is None."""
    if mine is None:
        return np.empty(0, "<u8")
    out = np.empty(HEADER_WORDS + mine.size, "<u8")
    HEADER.pack_into(out.data, 0, turn, mine.nbytes)
    out[HEADER_WORDS:] = mine.ravel()
    return out


def _move(sock: socket.socket, out: memoryview, into: memoryview, limit: float) -> None:
    """Write all of `out` and fill `into` at the same time: two writers with full buffers would wait forever."""
    sock.setblocking(False)
    sent = got = 0
    while sent < len(out) or got < len(into):
        moved = 0
        if sent < len(out):
            moved += (step := _try(sock.send, out[sent : sent + CHUNK]))
            sent += step
        if got < len(into):
            moved += (step := _try(sock.recv_into, into[got:]))
            got += step
        if not moved:
            _wait(sock, sent < len(out), got < len(into), limit)


def _try(operation: Callable[[memoryview], int], view: memoryview) -> int:
    """Bytes moved now; 0 when the socket would block."""
    try:
        count = operation(view)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return 0
    if not count:
        raise ConnectionResetError("connection closed")
    return count


def _wait(sock: socket.socket, writing: bool, reading: bool, limit: float) -> None:
    left = limit - time.monotonic()
    if left <= 0 or not wait_for([sock] if reading else [], left, [sock] if writing else []):
        raise TimeoutError("no progress in time")
