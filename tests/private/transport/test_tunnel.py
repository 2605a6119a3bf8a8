"""The tunnel: bytes of many connections in both directions, readers that stop, ends, and a hostile peer."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.errors import ShoalError
from shoal.private.transport import tunnel as tunnels
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import Channel, ClosedError, admit, connect, listen
from shoal.private.transport.frames import CLOSE, CREDIT, DATA, HEADER, MOST_OUT, OPEN
from shoal.private.transport.tunnel import SPU_SOCKET, STREAMS, TUNNEL_SOCKET, Tunnel, listen_locally
from tests.support.waiting import HANG, eventually

WINDOW = 1 << 18
"""Of the tunnels in these tests; that of real ones would only make them slower."""
KERNEL = 1 << 22
"""More bytes than the kernel's buffers of the sockets between two tunnels hold."""


@pytest.fixture(autouse=True)
def _window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnels, "WINDOW", WINDOW)


class Party:
    """One party's folder with its tunnel. `spu` stands for the socket on which its SPU listens."""

    def __init__(self, folder: Path, channel: Channel, rank: int) -> None:
        folder.mkdir()
        self.folder, self.spu = folder, listen_locally(folder / SPU_SOCKET)
        self.tunnel = Tunnel(channel, listen_locally(folder / TUNNEL_SOCKET), folder / SPU_SOCKET, rank)

    def dial(self) -> socket.socket:
        """A connection of this party's SPU to the peer's."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(HANG)
        sock.connect(str(self.folder / TUNNEL_SOCKET))
        return sock

    def accept(self) -> socket.socket:
        """A connection of the peer's SPU, at this party's."""
        sock, _ = self.spu.accept()
        sock.settimeout(HANG)
        return sock

    def stop_listening(self) -> None:
        """From now on this party's SPU takes nothing."""
        self.spu.close()
        (self.folder / SPU_SOCKET).unlink()

    def ended(self) -> ShoalError:
        """Why the tunnel has ended, once it has."""
        assert eventually(lambda: self.tunnel.ended)
        with pytest.raises(ShoalError) as caught:
            self.tunnel.check()
        return caught.value

    def close(self) -> None:
        self.tunnel.close()
        self.spu.close()


def channels(tls: dict[str, TLS] | None) -> tuple[Channel, Channel]:
    """Both ends of a connection: the server's and the client's."""
    if tls is None:
        near, far = socket.socketpair()
        return Channel(near, "the client"), Channel(far, "the server")
    with contextlib.closing(listen("127.0.0.1:0")) as listener:
        found: list[Channel] = []
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=lambda: found.append(connect(address, tls["client"], HANG)))
        thread.start()
        sock, _ = listener.accept()
        near_channel = admit(sock, "127.0.0.1", tls["server"])
        thread.join(HANG)
    return near_channel, found[0]


@contextlib.contextmanager
def parties(folder: Path, tls: dict[str, TLS] | None = None) -> Iterator[tuple[Party, Party]]:
    near, far = channels(tls)
    found = Party(folder / "s", near, 0), Party(folder / "c", far, 1)
    try:
        yield found
    finally:
        for party in found:
            party.close()


def exactly(sock: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        piece = sock.recv(count - len(parts))
        assert piece, f"the connection ended after {len(parts)} of {count} bytes"
        parts += piece
    return bytes(parts)


def exchange(sock: socket.socket, data: bytes, wanted: int) -> bytes:
    """Send `data` and read `wanted` bytes at the same time."""
    sender = threading.Thread(target=sock.sendall, args=(data,))
    sender.start()
    found = exactly(sock, wanted)
    sender.join(HANG)
    return found


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_many_streams_carry_their_own_bytes_both_ways_at_once(
    tmp_path: Path, certs: dict[str, TLS], secure: bool
) -> None:
    """Several windows of bytes each: with any wait of one direction for the other this would hang."""
    rng, size = random.Random(0), 4 * WINDOW + 12345
    with parties(tmp_path, certs if secure else None) as (server, client):
        pairs = []
        for caller, called in [(server, client), (client, server)] * 3:
            pairs.append((caller.dial(), called.accept()))
        ends = [sock for pair in pairs for sock in pair]
        sent = [rng.randbytes(size) for _ in ends]
        found: dict[int, bytes] = {}
        threads = [
            threading.Thread(target=lambda k=k, s=s: found.update({k: exchange(s, sent[k], size)}))  # type: ignore[misc]
            for k, s in enumerate(ends)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
        assert all(found[k] == sent[k ^ 1] for k in range(len(ends)))
        for sock in ends:
            sock.close()
        assert eventually(lambda: not server.tunnel.streams and not client.tunnel.streams)


def test_a_reader_that_stops_holds_up_its_own_stream_alone(tmp_path: Path) -> None:
    with parties(tmp_path) as (server, client):
        stuck, unread = server.dial(), client.accept()
        data, sent = random.Random(1).randbytes(WINDOW + MOST_OUT + KERNEL), 0
        stuck.settimeout(0)
        quiet, other = server.dial(), client.accept()
        while sent < len(data):  # until nothing more can go in, although all others move
            with contextlib.suppress(BlockingIOError):
                sent += stuck.send(data[sent : sent + (1 << 16)])
                continue
            assert exchange(quiet, b"go on", 0) == b""
            assert exactly(other, 5) == b"go on"
            other.sendall(b"yes")
            assert exactly(quiet, 3) == b"yes"
            (number,) = (n for n, stream in client.tunnel.streams.items() if stream.backlog)
            if not server.tunnel.streams[number].credit:
                break
        assert WINDOW <= sent <= WINDOW + MOST_OUT + KERNEL
        assert client.tunnel.streams[number].kept <= WINDOW
        stuck.settimeout(HANG)
        sender = threading.Thread(target=stuck.sendall, args=(data[sent:],))
        sender.start()
        assert exactly(unread, len(data)) == data
        sender.join(HANG)
        for sock in (stuck, unread, quiet, other):
            sock.close()


def test_an_end_reaches_the_other_side_after_all_bytes(tmp_path: Path) -> None:
    with parties(tmp_path) as (server, client):
        mine, theirs = client.dial(), server.accept()
        data = random.Random(2).randbytes(WINDOW + 1)
        mine.sendall(data[: 1 << 16])
        threading.Thread(target=lambda: (mine.sendall(data[1 << 16 :]), mine.shutdown(socket.SHUT_WR))).start()
        assert exactly(theirs, len(data)) == data
        assert theirs.recv(1) == b""
        theirs.sendall(b"the other direction is still open")
        theirs.close()
        assert exactly(mine, 33).startswith(b"the other")
        assert mine.recv(1) == b""
        mine.close()
        assert eventually(lambda: not server.tunnel.streams and not client.tunnel.streams)
        rude, gone = client.dial(), server.accept()
        gone.close()
        assert rude.recv(1) == b""
        rude.sendall(bytes(2 * WINDOW))  # nobody reads it, and it holds up nothing
        rude.close()
        assert eventually(lambda: not server.tunnel.streams and not client.tunnel.streams)


@pytest.mark.parametrize("closing", [0, 1])
def test_the_end_of_one_tunnel_ends_the_other_and_all_connections(tmp_path: Path, closing: int) -> None:
    with parties(tmp_path) as both:
        pairs = [(both[k].dial(), both[1 - k].accept()) for k in (0, 1)]
        both[closing].close()
        both[closing].tunnel.check()  # asked for
        error = both[1 - closing].ended()
        assert isinstance(error, ClosedError)
        assert str(error).startswith("found SPU's connection to the ")
        for sock in (s for pair in pairs for s in pair):
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
            sock.close()
        for party in both:
            with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="refused"):
                sock.connect(str(party.folder / TUNNEL_SOCKET))


def test_an_spu_process_that_listens_late_gets_everything(tmp_path: Path) -> None:
    with parties(tmp_path) as (server, client):
        server.stop_listening()
        mine = client.dial()
        mine.sendall(b"early")
        assert eventually(lambda: any(stream.backlog for stream in server.tunnel.streams.values()))
        server.spu = listen_locally(server.folder / SPU_SOCKET)
        theirs = server.accept()
        assert exactly(theirs, 5) == b"early"
        theirs.close()
        mine.close()


def frame(kind: int, number: int, size: int = 0, data: bytes = b"") -> bytes:
    return HEADER.pack(kind, number, size) + data


HOSTILE = {
    "a stream of our own number": frame(OPEN, 2),
    "a stream twice": frame(OPEN, 1) * 2,
    "data for no stream": frame(DATA, 1, 1, b"x"),
    "data after the end": frame(OPEN, 1) + frame(CLOSE, 1) + frame(DATA, 1, 1, b"x"),
    "more than its credit": frame(OPEN, 1) + frame(DATA, 1, WINDOW + 1, bytes(WINDOW + 1)),
    "4 GiB announced": frame(OPEN, 1) + frame(DATA, 1, (1 << 32) - 1, bytes(WINDOW + 1)),
    "too much credit": frame(OPEN, 1) + frame(CREDIT, 1, 1),
    "two ends": frame(OPEN, 1) + frame(CLOSE, 1) * 2,
    "an end of no stream": frame(CLOSE, 1),
    "too many streams": b"".join(frame(OPEN, 2 * k + 1) for k in range(STREAMS + 1)),
    "another kind": frame(9, 1),
    "not a frame": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_peer_that_breaks_the_rules_ends_its_own_tunnel(tmp_path: Path, data: bytes) -> None:
    near, far = channels(None)
    party = Party(tmp_path / "s", near, 0)
    party.stop_listening()
    far.sock.settimeout(HANG)
    with contextlib.suppress(OSError):  # it may hang up before everything is sent
        far.sock.sendall(data)
    assert "need a shoal party there" in str(party.ended())
    assert party.tunnel.streams == {} or all(s.kept <= WINDOW for s in party.tunnel.streams.values())
    party.close()
    far.close()


def test_as_much_as_the_credit_and_as_many_streams_as_allowed_are_no_offence(tmp_path: Path) -> None:
    near, far = channels(None)
    party = Party(tmp_path / "s", near, 0)
    party.stop_listening()
    far.sock.sendall(b"".join(frame(OPEN, 2 * k + 1) for k in range(STREAMS)))
    far.sock.sendall(frame(DATA, 1, WINDOW, bytes(WINDOW)))
    assert eventually(lambda: len(party.tunnel.streams) == STREAMS and party.tunnel.streams[1].room == 0)
    party.tunnel.check()
    party.close()
    far.close()


def test_frames_may_be_cut_anywhere(tmp_path: Path) -> None:
    near, far = channels(None)
    party = Party(tmp_path / "s", near, 0)
    for byte in frame(OPEN, 1) + frame(DATA, 1, 3, b"abc") + frame(DATA, 1, 0) + frame(DATA, 1, 2, b"de"):
        far.sock.sendall(bytes([byte]))
        assert eventually(lambda: not near.pending())
    sock = party.accept()
    assert exactly(sock, 5) == b"abcde"
    sock.close()
    party.close()
    far.close()


def test_a_path_that_no_unix_socket_can_have(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    with pytest.raises(ShoalError, match=r"found no place for a Unix socket at .*; need a short path .*set TMPDIR"):
        listen_locally(folder / TUNNEL_SOCKET)
