"""Many local connections over one connection to the peer: how SPU's bytes travel between the parties.

SPU listens on a Unix socket and connects to another one, both in a folder that only this user can enter. The second one
belongs to the party's `Tunnel`. It accepts SPU's connections, numbers them as streams, and sends their bytes in frames
to the peer's tunnel, which connects to the peer's SPU. So nothing of SPU can be reached over a network.

Why it cannot come to a deadlock:

1. One thread serves a tunnel. It never waits for one socket, but for all at once.
2. It always reads what the peer sends, even if SPU does not read. It has room: a stream may have at most WINDOW bytes
   that SPU has not taken yet, and they are kept here. Credit for more is sent when SPU has taken some.
3. So each tunnel empties the connection between both, and whatever a tunnel has to write is written in the end, credit
   included. A stream thus waits for nothing but its own reader, as it would in a connection of its own.

Memory: at most STREAMS streams of each side with WINDOW bytes each, and MOST_OUT bytes to be written. A peer that sends
more than it has credit for, or opens more streams, ends the tunnel.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from shoal.errors import ShoalError
from shoal.private.transport.channel import Channel, ClosedError
from shoal.private.transport.frames import BLOCKED, CHUNK, CLOSE, CREDIT, DATA, OPEN, FrameSocket

SPU_SOCKET, TUNNEL_SOCKET = "spu.sock", "tunnel.sock"
"""Names of the Unix sockets on which SPU and the tunnel listen."""
WINDOW = 1 << 22
"""Bytes of a stream that may be on their way. On a link of 300 ms this still allows 100 Mbit/s for each stream."""
STREAMS = 16
"""Most streams at a time that each side opens; SPU opens one or two."""
RETRY_MS = 20
"""Milliseconds between attempts to connect to an SPU process that does not listen yet."""


class Stream:
    """One connection of SPU: its local socket, and what is on its way."""

    def __init__(self, number: int, sock: socket.socket, connected: bool) -> None:
        self.number, self.sock, self.connected = number, sock, connected
        sock.setblocking(False)
        self.credit, self.room, self.owed = WINDOW, WINDOW, 0
        """Bytes that may be sent; that may be received; that SPU has taken and the peer was not told of."""
        self.backlog, self._start, self.kept = deque[bytearray](), 0, 0
        """Received and not yet taken: pieces, where the first one starts, and the bytes of all."""
        self.read_ended = self.write_ended = False
        """SPU sends no more; SPU takes no more."""
        self.close_sent = self.close_received = False

    @property
    def ended(self) -> bool:
        """Whether both sides have closed it. What SPU has not taken yet may be left."""
        return self.close_sent and self.close_received

    def connect(self, target: Path) -> None:
        """Try to reach an SPU process that may not listen yet."""
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            self.sock.connect(str(target))
            self.connected = True

    def read(self, into: memoryview) -> int:
        """Bytes that SPU had to send; sets `read_ended` at the end."""
        try:
            count = self.sock.recv_into(into[: self.credit])
        except BLOCKED:
            return 0
        except OSError:
            count = 0
        self.read_ended = not count
        return count

    def deliver(self, data: memoryview) -> int:
        """Bytes of `data` that SPU takes now. If it is gone, all count as taken."""
        if not self.write_ended and self.connected:
            try:
                return self.sock.send(data)
            except BLOCKED:
                return 0
            except OSError:
                self.write_ended = True
        return len(data) if self.write_ended else 0

    def take(self, data: memoryview) -> None:
        """Deliver `data` after the backlog, and keep the rest."""
        taken = 0 if self.backlog else self.deliver(data)
        self.owed += taken
        rest = data[taken:]
        self.kept += len(rest)
        # Short pieces are joined, because each piece takes memory of its own.
        if self.backlog and len(self.backlog[-1]) + len(rest) <= CHUNK:
            self.backlog[-1] += rest
        elif rest:
            self.backlog.append(bytearray(rest))

    def drain(self) -> None:
        """Deliver some of the backlog. At the end, tell SPU that nothing more comes."""
        while self.backlog:
            with memoryview(self.backlog[0]) as whole, whole[self._start :] as rest:
                taken, left = self.deliver(rest), len(rest)
            self.owed += taken
            self.kept -= taken
            self._start += taken
            if taken < left:
                break
            self.backlog.popleft()
            self._start = 0
        if self.close_received and not self.backlog and self.connected and not self.write_ended:
            self.write_ended = True
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)


class Tunnel:
    """Carries local connections over `channel`, which it owns, as it does `listener`; runs in a thread of its own.

    `listener` accepts the connections of this party's SPU. `target` is the Unix socket on which that SPU listens or
    will listen. `first` is 0 at the server and 1 at the client, so that both number their streams without agreement.
    """

    def __init__(self, channel: Channel, listener: socket.socket, target: Path, first: int) -> None:
        self.frames, self.listener, self.target = FrameSocket(channel), listener, target
        listener.setblocking(False)
        self.parity, self.next = first % 2, first
        self.streams: dict[int, Stream] = {}
        self._scratch = memoryview(bytearray(CHUNK))
        self._error: ShoalError | None = None
        self._stopped, self._stop = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="tunnel", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the peer or a fault has ended it."""
        return self._error is not None

    def check(self) -> None:
        """Raise why the tunnel has ended, if it has."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the tunnel, and with it the peer's. May be called again."""
        with contextlib.suppress(OSError):
            self._stop.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._stop.close()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except ShoalError as error:
            self._error = error
        except OSError as error:
            name = self.frames.channel.name
            self._error = ClosedError(f"found SPU's connection to {name} broken ({error}); need it open; try again")
        finally:
            for stream in self.streams.values():
                stream.sock.close()
            self.listener.close()
            self._stopped.close()
            self.frames.channel.close()

    def _turn(self) -> bool:
        """Wait until something can move, and move it. Returns whether to go on."""
        waiting = self._waiting()
        poll = select.poll()
        for descriptor, (events, _) in waiting.items():
            poll.register(descriptor, events)
        connecting = any(not stream.connected for stream in self.streams.values())
        patience = 0 if self.frames.channel.pending() else RETRY_MS if connecting else None
        ready = dict(poll.poll(patience))
        if self._stopped.fileno() in ready:
            return False
        if self.frames.channel.pending():
            ready[self.frames.channel.sock.fileno()] = select.POLLIN
        for descriptor in ready:
            waiting[descriptor][1]()
        for stream in list(self.streams.values()):
            self._settle(stream)
        self.frames.flush()
        return True

    def _waiting(self) -> dict[int, tuple[int, Callable[[], None]]]:
        """What may move, by descriptor: the events to wait for, and what to do then."""
        peer = select.POLLIN | (select.POLLOUT if self.frames.out else 0)
        found = {self.frames.channel.sock.fileno(): (peer, self._receive)}
        found[self._stopped.fileno()] = (select.POLLIN, lambda: None)
        mine = sum(number % 2 == self.parity for number in self.streams)
        if self.frames.has_room and mine < STREAMS:
            found[self.listener.fileno()] = (select.POLLIN, self._accept)
        for stream in self.streams.values():
            readable = stream.connected and not stream.read_ended and stream.credit and self.frames.has_room
            writable = stream.connected and stream.backlog
            events = (select.POLLIN if readable else 0) | (select.POLLOUT if writable else 0)
            if events:
                found[stream.sock.fileno()] = (events, lambda s=stream: self._send(s))  # type: ignore[misc]
        return found

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it may have gone again
            sock, _ = self.listener.accept()
            self.streams[self.next] = Stream(self.next, sock, True)
            self.frames.put(OPEN, self.next)
            self.next += 2

    def _send(self, stream: Stream) -> None:
        """Send what SPU has for the peer."""
        if stream.read_ended or not stream.credit or not self.frames.has_room:
            return
        count = stream.read(self._scratch)
        if count:
            stream.credit -= count
            self.frames.put(DATA, stream.number, count, self._scratch[:count])

    def _settle(self, stream: Stream) -> None:
        """Deliver what is left, tell the peer what it needs to know, and forget a stream that has ended."""
        if not stream.connected:
            stream.connect(self.target)
        stream.drain()
        if not self.frames.has_room:
            return
        if stream.owed >= WINDOW // 4:
            self.frames.put(CREDIT, stream.number, stream.owed)
            stream.room += stream.owed
            stream.owed = 0
        if stream.read_ended and not stream.close_sent:
            stream.close_sent = True
            self.frames.put(CLOSE, stream.number)
        if stream.ended and not stream.backlog:
            stream.sock.close()
            del self.streams[stream.number]

    def _receive(self) -> None:
        for kind, number, size, piece in self.frames.receive():
            stream = self.streams.get(number)
            if kind == OPEN and stream is None and self._may_open(number):
                self.streams[number] = Stream(number, socket.socket(socket.AF_UNIX), False)
            elif kind == DATA and stream is not None and not stream.close_received and size <= stream.room:
                stream.room -= size
                stream.take(piece)
            elif kind == CLOSE and stream is not None and not stream.close_received:
                stream.close_received = True
            elif kind == CREDIT and (stream is None or stream.credit + size <= WINDOW):
                # Credit for a stream that has ended may still be on its way.
                if stream is not None:
                    stream.credit += size
            else:
                raise ShoalError(
                    f"found frame {kind} of {size} bytes for stream {number} from {self.frames.channel.name}; need a "
                    "shoal party there"
                )

    def _may_open(self, number: int) -> bool:
        theirs = sum(n % 2 != self.parity and not stream.ended for n, stream in self.streams.items())
        return number % 2 != self.parity and theirs < STREAMS


def listen_locally(path: Path) -> socket.socket:
    """A listening Unix socket at `path`. Raises ShoalError where the path is too long for one."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(str(path))
        sock.listen(STREAMS)
    except OSError as error:
        sock.close()
        raise ShoalError(
            f"found no place for a Unix socket at {path} ({error}); need a short path that can be written; "
            "set TMPDIR to a folder like /tmp"
        ) from error
    return sock
