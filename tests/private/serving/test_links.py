"""The second connection of a session: who may open it, how often and when, and what else listens meanwhile."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from shoal.costs.links import LINKS
from shoal.errors import ShoalError
from shoal.measuring.relay import relayed
from shoal.private.program.artifact import load_artifact
from shoal.private.serving import session as sessions
from shoal.private.serving import spu_link
from shoal.private.serving.client import Client
from shoal.private.serving.links import Links
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.server import HIDDEN, Server
from shoal.private.serving.spu_link import connect_second, terms_of
from shoal.private.transport.certs import TLS, make_certificates
from shoal.private.transport.channel import Channel, connect, connect_again, parse_address, peer_address
from shoal.private.transport.tunnel import SPU_SOCKET, TUNNEL_SOCKET, Tunnel, listen_locally
from tests.support.forked import forked, heard, serve
from tests.support.parties import Case
from tests.support.processes import children, in_thread, tcp_sockets
from tests.support.waiting import HANG, eventually

REFUSED = "found a second connection from the client at .* without the token of a waiting session; need"


class NoWorker:
    """In place of an SPU process: ready as soon as its connection is there."""

    carried: list[Channel]
    tunnel: Tunnel | None = None

    def __init__(self, order: dict[str, Any]) -> None:
        ours, self.process = socket.socketpair()
        self.channel = Channel(ours, "the SPU process")

    def carry(self, link: Channel) -> None:
        self.carried.append(link)
        Channel(self.process, "the parent").send({"type": "ready"})

    def end(self) -> None:
        for link in self.carried:
            link.close()
        if self.tunnel is not None:
            self.tunnel.close()
        self.channel.close()
        self.process.close()


@pytest.fixture
def server(small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sessions, "Worker", NoWorker)
    monkeypatch.setattr(NoWorker, "carried", [], raising=False)
    options = ServerOptions(pool=tmp_path / "s", max_clients=1)
    with in_thread(Server(small.folder, "127.0.0.1:0", certs["server"], options)) as found:
        yield found


@contextlib.contextmanager
def preparing(net: Case, server: Server, tls: TLS) -> Iterator[tuple[Channel, str]]:
    """The control connection of a client that wants to make items, and the token that it was given."""
    control = connect(server.address, tls, HANG, 1 << 18)
    terms = terms_of(load_artifact(net.folder, "client"))
    hello = {"type": "hello", "terms": terms, "task": "prepare", "client": "0" * 16, "threads": 1, "batch": 1}
    control.send(hello)
    welcome, _ = control.receive()
    assert welcome["type"] == "welcome", welcome
    assert len(bytes.fromhex(welcome["link"])) == 32
    yield control, welcome["link"]
    control.close()


@pytest.mark.private
def test_a_token_is_for_one_connection_of_one_certificate(small: Case, certs: dict[str, TLS], server: Server) -> None:
    with preparing(small, server, certs["client"]) as (control, token):
        for tls, wrong in (
            (certs["client"], "0" * 64),
            (certs["client"], ""),
            (certs["client"], "\udc80"),
            (certs["client"], 7),
            (certs["server"], token),  # another certificate of the same authority
        ):
            with pytest.raises(ShoalError, match=REFUSED):
                connect_second(control, tls, wrong)  # type: ignore[arg-type]
        link = connect_second(control, certs["client"], token)  # none of these had cost the session its token
        assert control.receive()[0]["type"] == "ready"
        with pytest.raises(ShoalError, match=REFUSED):
            connect_second(control, certs["client"], token)
        (carried,) = NoWorker.carried
        assert carried.certificate() == ssl.PEM_cert_to_DER_cert(certs["client"].cert.read_text())
        assert len(server.errors) == 6
        link.close()
    assert eventually(lambda: not server._sessions)
    assert server.served == 1  # the session, and none of the connections beside it


@pytest.mark.private
def test_a_token_is_worth_nothing_after_its_time(
    small: Case, certs: dict[str, TLS], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spu_link, "LINK_SECONDS", 0.0)
    with preparing(small, server, certs["client"]) as (control, token):
        assert control.receive()[0]["type"] == "error"
        assert "found no second connection from the client at" in server.errors[-1]
        other = connect(server.address, certs["client"], HANG)
        other.send({"type": "link", "token": token})
        assert "without the token" in other.receive()[0]["message"]
        other.close()
    assert NoWorker.carried == []


@pytest.mark.private
def test_a_token_ends_with_its_session(small: Case, certs: dict[str, TLS], server: Server) -> None:
    with preparing(small, server, certs["client"]) as (_, token):
        pass
    assert eventually(lambda: not server._sessions)
    other = connect(server.address, certs["client"], HANG)
    with pytest.raises(ShoalError, match=REFUSED):
        connect_second(other, certs["client"], token)
    other.close()


@pytest.mark.private
def test_garbage_and_silence_before_the_token_end_their_own_connection_only(
    small: Case, certs: dict[str, TLS], server: Server
) -> None:
    with preparing(small, server, certs["client"]) as (control, token):
        for data in (b"GET / HTTP/1.1\r\n\r\n", bytes(64), b""):
            with socket.create_connection(parse_address(server.address, "it")) as sock, contextlib.suppress(OSError):
                sock.sendall(data)
        garbage = connect_again(control, certs["client"], HANG)
        garbage.sock.sendall(bytes([255]) * 64)  # within TLS
        assert garbage.receive()[0]["message"] == HIDDEN
        garbage.close()
        assert "found a frame of 4294967295" in server.errors[-1]
        connect_second(control, certs["client"], token).close()
        assert control.receive()[0]["type"] == "ready"


def test_a_connection_that_comes_when_its_session_has_failed_is_closed() -> None:
    links, (ours, theirs) = Links(), socket.socketpair()
    channel = Channel(ours, "the client")
    with contextlib.suppress(RuntimeError), links.expect(channel) as expected:
        links.hand_over(channel, expected.token)
        raise RuntimeError
    assert theirs.recv(1) == b""
    theirs.close()


class Tunnelled(NoWorker):
    """In place of an SPU process that is silent, with its real connection."""

    def carry(self, link: Channel) -> None:
        self.tunnel = Tunnel(link, listen_locally(self.folder / TUNNEL_SOCKET), self.folder / SPU_SOCKET, 0)

    folder: Path


@pytest.mark.private
def test_a_session_ends_with_its_second_connection(
    small: Case, certs: dict[str, TLS], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "Worker", Tunnelled)
    monkeypatch.setattr(Tunnelled, "folder", tmp_path, raising=False)
    with preparing(small, server, certs["client"]) as (control, token):
        connect_second(control, certs["client"], token).close()
        assert control.receive()[0]["message"].startswith("found the session ended by the server")
        assert "found SPU's connection to the client at 127.0.0.1 closed" in server.errors[-1]
    assert eventually(lambda: not server._sessions)


@pytest.mark.private
def test_the_second_connection_is_checked_as_the_first(
    small: Case, certs: dict[str, TLS], tmp_path: Path, server: Server
) -> None:
    """TLS 1.3, the same host name, the same authority."""
    elsewhere = make_certificates(tmp_path / "a", ("example.org",))
    foreign = make_certificates(tmp_path / "b")
    control = connect(server.address, certs["client"], HANG)
    again = connect_again(control, certs["client"], HANG)
    assert again.sock.version() == "TLSv1.3"  # type: ignore[attr-defined]
    assert again.certificate() == control.certificate() != b""
    again.close()
    with pytest.raises(ShoalError, match="no valid TLS at the server"):
        connect_again(control, foreign["client"], HANG)
    server.local = replace(server.local, tls=elsewhere["server"])
    with pytest.raises(ShoalError, match=r"need a certificate for 127\.0\.0\.1"):
        connect_again(control, elsewhere["client"], HANG)
    control.close()


@pytest.mark.private
def test_the_second_connection_passes_the_same_relay(small: Case, certs: dict[str, TLS], server: Server) -> None:
    with (
        relayed(server.address, LINKS["lan"]) as relay,
        contextlib.closing(connect(relay.address, certs["client"], HANG)) as control,
    ):
        before = relay.counters.down
        again = connect_again(control, certs["client"], HANG)
        assert peer_address(again) == parse_address(relay.address, "it")
        assert relay.counters.down >= before + 500  # the server's certificate once more
        again.close()


# ---------------------------------------------------------------- with SPU


def make(pipe: Connection, folder: Path, tls: TLS, address: str, pool: Path) -> None:
    """A client that makes two items, and stops between them until it is told to go on."""
    client = Client(folder, address, tls, ClientOptions(pool=pool))
    pipe.send(client.prepare(2, progress=lambda *_: (pipe.send("made"), pipe.recv())).items)


@pytest.mark.slow
@pytest.mark.private
def test_nothing_of_a_preparation_listens_on_tcp_but_the_servers_port(
    small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None
) -> None:
    with forked(serve, small.folder, certs["server"], tmp_path / "s") as (server, words):
        address = heard(words)
        with forked(make, small.folder, certs["client"], address, tmp_path / "c") as (client, pipe):
            assert heard(pipe) == "made"
            pids = int(server.pid or 0), int(client.pid or 0)
            (near,), (far,) = (children(pid) for pid in pids)
            port = parse_address(address, "it")[1]
            listening, connected = (tcp_sockets(pids[0], listening) for listening in (True, False))
            assert listening == [port]
            assert connected == [port, port]  # the control connection and the second one
            assert tcp_sockets(pids[1], True) == []
            assert len(tcp_sockets(pids[1], False)) == 2
            for worker in (near, far):
                assert tcp_sockets(worker, True) == tcp_sockets(worker, False) == []
                folder = Path(f"/proc/{worker}/cwd").resolve()
                assert folder.stat().st_mode & 0o777 == 0o700
                assert {path.name for path in folder.glob("*.sock")} == {"spu.sock", "tunnel.sock"}
            for _ in range(2):
                pipe.send("go on")
                assert heard(pipe) in ("made", 2)
        assert eventually(lambda: not folder.exists())
