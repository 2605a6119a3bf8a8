"""The frames of a tunnel, over one connection that never blocks.

A frame consists of its kind (1 byte), the number of a stream (4 bytes), a size (4 bytes), and for DATA that many bytes.
The sender may be hostile: a size alone reserves no memory, and data are passed on in the pieces in which they arrive.
"""

from __future__ import annotations

import ssl
import struct
from collections.abc import Iterator

from shoal.private.transport.channel import Channel, ClosedError

OPEN, DATA, CREDIT, CLOSE = range(4)
HEADER = struct.Struct(">BII")
CHUNK = 1 << 18
"""Most bytes of one read or write."""
MOST_OUT = 1 << 20
"""Bytes that wait to be written before no more are accepted."""
BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
Frame = tuple[int, int, int, memoryview]
"""Kind, stream, size, and a piece of the data. DATA comes in pieces, each with its own length as the size."""


class FrameSocket:
    """Frames over the socket of `channel`. Raises ClosedError when the other end is gone, OSError when it fails."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        channel.sock.setblocking(False)
        self.out = bytearray()
        self._into = memoryview(bytearray(CHUNK))
        self._header, self._stream, self._left = b"", 0, 0

    @property
    def has_room(self) -> bool:
        """Whether another frame may be put. At most MOST_OUT bytes and one frame wait to be written."""
        return len(self.out) < MOST_OUT

    def put(self, kind: int, stream: int, size: int = 0, data: memoryview | bytes = b"") -> None:
        """Append a frame to what `flush` writes."""
        self.out += HEADER.pack(kind, stream, size)
        self.out += data

    def flush(self) -> None:
        """Write as much as the connection takes now."""
        done = 0
        with memoryview(self.out) as view:
            while done < len(view):
                try:
                    # After a write that would block, TLS needs the same bytes again: `out` only grows at its end.
                    done += self.channel.sock.send(view[done : done + CHUNK])
                except BLOCKED:
                    break
        del self.out[:done]

    def receive(self) -> Iterator[Frame]:
        """What has arrived. The pieces of data are valid until the next frame is asked for."""
        got = self._fill()
        at = 0
        while at < got:
            if self._left:
                piece = self._into[at : min(got, at + self._left)]
                self._left -= len(piece)
                at += len(piece)
                yield DATA, self._stream, len(piece), piece
                continue
            part = bytes(self._into[at : min(got, at + HEADER.size - len(self._header))])
            self._header += part
            at += len(part)
            if len(self._header) == HEADER.size:
                (kind, stream, size), self._header = HEADER.unpack(self._header), b""
                if kind == DATA:
                    self._stream, self._left = stream, size
                else:
                    yield kind, stream, size, self._into[:0]

    def _fill(self) -> int:
        """Bytes read into the buffer; TLS gives them by records of at most 16 KiB."""
        got = 0
        while got < len(self._into):
            try:
                count = self.channel.sock.recv_into(self._into[got:])
            except BLOCKED:
                break
            if not count and not got:
                raise ClosedError(
                    f"found SPU's connection to {self.channel.name} closed; need it open; look at its log and try again"
                )
            if not count:
                break
            got += count
        return got
