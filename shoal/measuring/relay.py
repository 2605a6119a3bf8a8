"""A simulated link: a relay between two parties that delays and limits both directions, and counts bytes.

It needs only two sockets and no kernel support (many kernels have no netem queue). A byte leaves when the link is free
(`rate`) and arrives half a round trip later, independent of other traffic.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from shoal.costs.links import Link
from shoal.errors import ShoalError
from shoal.private.transport.channel import parse_address

CHUNK = 1 << 16
PROBE_BYTES = 1 << 22


@dataclass
class Counters:
    """Bytes that the relay has forwarded, to the server (`up`) and to the client (`down`)."""

    up: int = 0
    down: int = 0


class Relay:
    """Forwards connections from `address` to `target` (``"host:port"``) over a simulated link, `profile`.

    All connections share the rate of the link, in each direction. Runs in its own thread between `start` and `stop`.
    Raises ShoalError for a malformed target.
    """

    def __init__(self, target: str, profile: Link) -> None:
        self.target, self.profile, self.counters = parse_address(target, "the relay's target"), profile, Counters()
        self.address = ""
        self._free = {"up": 0.0, "down": 0.0}
        """When the link is free in each direction."""
        self._ready, self._ended = threading.Event(), asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def start(self) -> None:
        """Listen on a free port of loopback and set `address`."""
        self._thread.start()
        self._ready.wait(10)

    def stop(self) -> None:
        """Close all connections and stop the thread."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._ended.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        try:
            far, far_out = await asyncio.open_connection(*self.target)
        except OSError:
            near_out.close()
            return
        for writer in (near_out, far_out):
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.gather(self._carry(near, far_out, "up"), self._carry(far, near_out, "down"))
        except asyncio.CancelledError:
            pass  # from `stop`; asyncio would log it as an error of the connection
        finally:
            near_out.close()
            far_out.close()

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
        """Forward one direction: each chunk waits until the link is free, then takes half a round trip."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        deliver = asyncio.ensure_future(self._deliver(queue, sink))
        while data := await _read(source):
            free = max(self._free[way], time.perf_counter()) + 8 * len(data) / self.profile.rate
            self._free[way] = free
            setattr(self.counters, way, getattr(self.counters, way) + len(data))
            queue.put_nowait((free + self.profile.rtt_s / 2, data))
        queue.put_nowait((time.perf_counter() + self.profile.rtt_s / 2, b""))
        await deliver

    async def _deliver(self, queue: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, data = await queue.get()
                # The event loop's timer is coarse, so the last millisecond is spent polling.
                if (left := due - time.perf_counter()) > 1e-3:
                    await asyncio.sleep(left - 1e-3)
                while time.perf_counter() < due:
                    await asyncio.sleep(0)
                if not data:
                    sink.write_eof()  # the other direction may still be open
                    return
                sink.write(data)
                await sink.drain()


async def _read(source: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(OSError):
        return await source.read(CHUNK)
    return b""


@contextlib.contextmanager
def relayed(target: str, profile: Link) -> Iterator[Relay]:
    """Run a relay in front of `target` within the block."""
    relay = Relay(target, profile)
    relay.start()
    try:
        yield relay
    finally:
        relay.stop()


@dataclass(frozen=True)
class Achieved:
    """The link that a relay achieved: median round trip in seconds, and rate of one direction in bits per second."""

    rtt_s: float
    rate: float


def probe(profile: Link, rounds: int = 15) -> Achieved:
    """Measure round trips of one byte and a bulk transfer through a relay of `profile`, with an echo on loopback.

    Raises ShoalError when the machine is too busy: the round trip is off by more than a fifth plus a millisecond, or
    the rate is less than half.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_echo, args=(listener,), daemon=True).start()
        with relayed(f"127.0.0.1:{listener.getsockname()[1]}", profile) as relay:
            host, port = parse_address(relay.address, "the relay")
            with socket.create_connection((host, port)) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                found = Achieved(_round_trip(sock, rounds), _bulk(sock))
    if abs(found.rtt_s - profile.rtt_s) > 0.2 * profile.rtt_s + 1e-3 or found.rate < 0.5 * profile.rate:
        raise ShoalError(
            f"found {found.rtt_s * 1e3:.2f} ms and {found.rate / 1e6:.0f} Mbit/s; need about "
            f"{profile.rtt_s * 1e3:.2f} ms and {profile.rate / 1e6:.0f}; measure on an idle machine"
        )
    return found


def _echo(listener: socket.socket) -> None:
    """Answer each byte, and each bulk of PROBE_BYTES, with one byte."""
    sock, _ = listener.accept()
    with sock, contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while first := sock.recv(1):
            left = PROBE_BYTES - 1 if first == b"B" else 0
            while left:
                left -= len(sock.recv(min(left, CHUNK)))
            sock.sendall(b"k")


def _round_trip(sock: socket.socket, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        sock.sendall(b"p")
        sock.recv(1)
        times.append(time.perf_counter() - begun)
    return sorted(times)[rounds // 2]


def _bulk(sock: socket.socket) -> float:
    wait = _round_trip(sock, 5)
    begun = time.perf_counter()
    sock.sendall(b"B" * PROBE_BYTES)
    sock.recv(1)
    return 8 * PROBE_BYTES / max(1e-9, time.perf_counter() - begun - wait)
