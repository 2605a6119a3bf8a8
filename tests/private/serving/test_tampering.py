"""Somebody on the network, or the peer, who alters what is sent, and a certificate that is not the pool's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shoal.costs.links import Link
from shoal.errors import ShoalError
from shoal.measuring import relay as network
from shoal.measuring.relay import Relay
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS
from shoal.private.transport.wire import SocketWire
from tests.support.dealing import stock
from tests.support.forked import TURNS
from tests.support.parties import Case
from tests.support.processes import in_thread
from tests.support.waiting import HANG

FAST = Link(1e12, 0.0)
UNITS = 12


def right(net: Case, logits: np.ndarray) -> bool:
    return bool(np.abs(logits - net.truth(len(logits))).max() <= UNITS * net.unit)


class Tampering(Relay):
    """Once armed, flips the last bit of the next bytes that go `way`: "up" to the server, "down" to the client."""

    armed = ""

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
        while data := await network._read(source):
            if self.armed == way:
                self.armed, data = "", data[:-1] + bytes([data[-1] ^ 1])
            sink.write(data)
        sink.write_eof()


@pytest.fixture
def site(small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None) -> Iterator[tuple[Server, tuple[Path, Path]]]:
    folders = stock(small, tmp_path / "c", tmp_path / "s", certs["client"].cert, 2 * TURNS + 2)
    own = Server(small.folder, "127.0.0.1:0", certs["server"], ServerOptions(pool=tmp_path / "s"))
    with in_thread(own) as server:
        yield server, folders


@pytest.mark.private
@pytest.mark.parametrize("message", [("up", 0), ("up", 5), ("up", 8), ("down", 1), ("down", 6), ("down", 9)])
def test_a_tampered_tls_record_ends_the_session_and_burns_one_item(
    small: Case,
    certs: dict[str, TLS],
    tmp_path: Path,
    site: tuple[Server, tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    message: tuple[str, int],
) -> None:
    (way, turn), (server, folders) = message, site
    image, before = small.images[:1].numpy(), len(list(folders[0].glob("*.item")))
    relay, real = Tampering(server.address, FAST), SocketWire._both
    relay.start()

    peer = "the server" if way == "up" else "the client"  # whom the sender speaks to

    def arming(wire: SocketWire, mine: np.ndarray | None, words: int) -> np.ndarray:
        if wire.turn == turn and mine is not None and wire.channel.name.startswith(peer):
            relay.armed = way
        return real(wire, mine, words)

    with Client(small.folder, relay.address, certs["client"], ClientOptions(pool=tmp_path / "c")) as client:
        assert right(small, client.query(image).logits)
        monkeypatch.setattr(SocketWire, "_both", arming)
        with pytest.raises(ShoalError, match=r"found the server at .*need") as caught:
            client.query(image)
        assert "in time" not in str(caught.value)  # it was no limit that ended it
    monkeypatch.undo()
    relay.stop()
    with Client(small.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c")) as client:
        assert right(small, client.query(image).logits)
    for folder in folders:
        assert len((folder / "spent").read_text().split()) == 3
        assert len(list(folder.glob("*.item"))) == before - 3
    (error,) = server.errors
    assert "record mac" in (error if way == "up" else str(caught.value))  # who received it says what was wrong


@pytest.mark.private
def test_bits_flipped_by_the_peer_change_no_more_than_the_result(
    small: Case,
    certs: dict[str, TLS],
    tmp_path: Path,
    site: tuple[Server, tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No message is authenticated beyond TLS: a party may always lie about its shares."""
    server, folders = site
    image, real, flipped = small.images[:1].numpy(), SocketWire._both, list[bool]()
    with Client(small.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c")) as client:
        for turn in range(TURNS):

            def flipping(wire: SocketWire, mine: np.ndarray | None, words: int, turn: int = turn) -> np.ndarray:
                if wire.turn == turn and mine is not None and wire.channel.name.startswith("the server"):
                    mine = mine ^ np.uint64(1 << 30)
                return real(wire, mine, words)

            with monkeypatch.context() as patch:
                patch.setattr(SocketWire, "_both", flipping)
                flipped.append(not right(small, client.query(image).logits))
            assert right(small, client.query(image).logits)
    assert sum(flipped) >= 4  # bits of digits that agree change nothing
    assert not flipped[TURNS - 1]  # the client only listens
    assert server.errors == []
    assert len((folders[1] / "spent").read_text().split()) == 2 * TURNS


@pytest.mark.private
def test_items_belong_to_a_certificate(
    small: Case, certs: dict[str, TLS], tmp_path: Path, site: tuple[Server, tuple[Path, Path]]
) -> None:
    server, folders = site
    names = sorted(path.stem for path in folders[1].glob("*.item"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "client-id").write_text((tmp_path / "c" / "client-id").read_text())
    # Another certificate of the same authority, with the first client's own name and the names of its items.
    with Client(small.folder, server.address, certs["server"], ClientOptions(pool=tmp_path / "other")) as thief:
        assert thief._queries is not None
        session = thief._queries.session
        session.control.send({"type": "infer", "name": names[0]})
        with pytest.raises(ShoalError, match="server's log"):
            session.from_peer(("go",), HANG)
    assert f"found no item {names[0]}" in server.errors[-1]
    assert sorted(path.stem for path in folders[1].glob("*.item")) == names
    with Client(small.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c")) as client:
        assert right(small, client.query(small.images[:1].numpy()).logits)


@pytest.mark.private
def test_a_key_of_another_certificate_is_refused_at_once(small: Case, certs: dict[str, TLS], spu: None) -> None:
    crossed = TLS(certs["client"].cert, certs["server"].key, certs["client"].ca)
    for make in (Server, Client):
        with pytest.raises(ShoalError, match="TLS files that cannot be used"):
            make(small.folder, "127.0.0.1:0", crossed)
