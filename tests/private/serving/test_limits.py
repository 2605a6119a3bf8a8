"""What one client may take of a server: silent connections lock nobody out, and no certificate takes everything."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.errors import ShoalError
from shoal.private.serving import limits
from shoal.private.serving.client import Client
from shoal.private.serving.limits import SILENT, SILENT_OF_ADDRESS, TURN_SECONDS, Connection, Connections, Engines
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.server import Server
from shoal.private.serving.session import RefusedError
from shoal.private.transport.allowed import read_fingerprints
from shoal.private.transport.certs import TLS, fingerprint_of_file
from shoal.private.transport.channel import parse_address
from tests.support.dealing import stock
from tests.support.parties import Case
from tests.support.processes import in_thread
from tests.support.waiting import HANG, eventually

ME, YOU = "a" * 16, "b" * 16


def closed(sock: socket.socket) -> bool:
    sock.settimeout(HANG)
    return sock.recv(1) == b""


# ---------------------------------------------------------------- connections


@contextlib.contextmanager
def entered(gate: Connections, hosts: list[str]) -> Iterator[list[tuple[Connection, socket.socket]]]:
    """A connection from each of `hosts`, and the client's end of each."""
    pairs = [socket.socketpair() for _ in hosts]
    found = [(gate.enter(mine, host), theirs) for (mine, theirs), host in zip(pairs, hosts, strict=True)]
    try:
        yield found
    finally:
        for connection, _ in found:
            gate.leave(connection)
        for pair in pairs:
            for sock in pair:
                sock.close()


def test_an_address_closes_only_its_own_silent_connections() -> None:
    with entered(Connections(8, 4), ["friend", *["stranger"] * (SILENT_OF_ADDRESS + 3)]) as found:
        assert [bool(c.cut) for c, _ in found] == [False, True, True, True, *[False] * SILENT_OF_ADDRESS]
        assert all(closed(theirs) for c, theirs in found if c.cut)


def test_many_addresses_close_the_oldest_of_all() -> None:
    with entered(Connections(8, 4), [str(i) for i in range(SILENT + 2)]) as found:
        assert [i for i, (c, _) in enumerate(found) if c.cut] == [0, 1]


def test_connections_that_have_greeted_are_never_closed_for_others() -> None:
    gate = Connections(8, 4)
    with entered(gate, ["here"]) as ((friend, _),):
        gate.greet(friend)
        with entered(gate, ["here"] * (SILENT_OF_ADDRESS + 1)) as found:
            assert not friend.cut
            assert found[0][0].cut


def test_a_silent_connection_has_a_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Connections(8, 4)
    with entered(gate, ["here"] * 3) as found:
        gate.greet(found[1][0])
        gate.expire()
        assert not any(c.cut for c, _ in found)
        monkeypatch.setattr(limits, "GREETING_SECONDS", -1.0)
        gate.expire()
        assert [bool(c.cut) for c, _ in found] == [True, False, True]


def test_a_certificate_has_some_of_the_sessions() -> None:
    gate = Connections(3, 2)
    with entered(gate, ["here"] * 5) as found:
        (one, _), (two, _), (three, _), (other, _), (late, _) = found
        gate.begin(one, ME)
        gate.begin(two, ME)
        with pytest.raises(RefusedError, match=r"found 2 sessions of this certificate .* need fewer for one more"):
            gate.begin(three, ME)
        gate.begin(other, YOU)
        with pytest.raises(RefusedError, match="found 3 clients at the server; need fewer"):
            gate.begin(late, YOU)
    with entered(gate, ["here"]) as ((again, _),):
        gate.begin(again, ME)  # those sessions have ended


def test_by_default_one_certificate_gets_half_of_the_sessions() -> None:
    assert [ServerOptions(max_clients=n).sessions_each for n in (1, 3, 8)] == [2, 2, 4]
    assert ServerOptions(certificate_sessions=7).sessions_each == 7


@pytest.mark.private
def test_silent_connections_lock_no_client_out(small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None) -> None:
    stock(small, tmp_path / "c", tmp_path / "s", certs["client"].cert, 1)
    options = ServerOptions(pool=tmp_path / "s")
    with (
        in_thread(Server(small.folder, "127.0.0.1:0", certs["server"], options)) as server,
        contextlib.ExitStack() as s,
    ):
        address = parse_address(server.address, "it")
        silent = [s.enter_context(socket.create_connection(address)) for _ in range(SILENT_OF_ADDRESS + 2)]
        with Client(small.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c")) as client:
            client.query(small.images[:1].numpy())
        assert closed(silent[0])
        assert eventually(lambda: server.metrics.snapshot()["refusals"].get("connections", 0) >= 2)
        assert any("silent connections at the server" in error for error in server.errors)


@pytest.mark.private
def test_a_connection_that_sends_no_message_is_closed_in_time(
    small: Case, spu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "GREETING_SECONDS", 0.1)
    options = ServerOptions(insecure=True)
    with in_thread(Server(small.folder, "127.0.0.1:0", None, options)) as server:
        with socket.create_connection(parse_address(server.address, "it")) as sock:
            sock.sendall(b"\0")  # a byte now and then is no message
            assert closed(sock)
        assert eventually(lambda: any("without a valid message after 0.1 s" in error for error in server.errors))


# ---------------------------------------------------------------- the list of certificates


@pytest.mark.private
def test_only_listed_certificates_are_admitted(small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None) -> None:
    allow, mine = tmp_path / "allow", fingerprint_of_file(certs["client"].cert)
    allow.write_text(f"{fingerprint_of_file(certs['server'].cert)}  # somebody else\n")
    options = ServerOptions(pool=tmp_path / "s", allow=allow)
    with in_thread(Server(small.folder, "127.0.0.1:0", certs["server"], options)) as server:

        def open_one() -> None:
            client = Client(small.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c"))
            with contextlib.closing(client):
                client.open()

        with pytest.raises(ShoalError, match=f"found a certificate with the fingerprint {mine} .*ask its operator"):
            open_one()
        assert server.metrics.snapshot()["refusals"] == {"allow": 1}
        allow.write_text(f"# hospital\n{':'.join(mine[i : i + 2] for i in range(0, 64, 2)).upper()}\n")
        open_one()  # the list is read again for each connection
        allow.write_text("nonsense")
        with pytest.raises(ShoalError, match="need"):
            open_one()


def test_a_list_that_cannot_be_read_admits_nobody(tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match="found no readable list"):
        read_fingerprints(tmp_path / "absent")
    (tmp_path / "bad").write_text(f"{'a' * 64}\n{'b' * 16}\n")
    with pytest.raises(ShoalError, match=r"found 'b+' at line 2 of .*need the SHA-256"):
        read_fingerprints(tmp_path / "bad")
    (tmp_path / "good").write_text(f"\n# name\n{'A' * 64} # other\n")
    assert read_fingerprints(tmp_path / "good") == {"a" * 64}


@pytest.mark.private
def test_a_list_needs_certificates(small: Case, tmp_path: Path, spu: None) -> None:
    (tmp_path / "allow").write_text("")
    with pytest.raises(ShoalError, match="found a list of certificates"):
        Server(small.folder, "127.0.0.1:0", None, ServerOptions(insecure=True, allow=tmp_path / "allow"))


# ---------------------------------------------------------------- SPU processes


def test_the_next_turn_goes_to_the_certificate_with_the_fewest() -> None:
    engines = Engines(1)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as rest:
        place = first.enter_context(engines.place(ME))
        assert place.wait(0)
        mine = [rest.enter_context(engines.place(ME)) for _ in range(2)]
        yours = rest.enter_context(engines.place(YOU))
        assert not any(p.wait(0) for p in (*mine, yours))
        first.close()
        assert yours.wait(0)  # though it came last
        assert not any(p.wait(0) for p in mine)


def test_a_certificate_gets_all_processes_but_one() -> None:
    engines = Engines(3)
    with contextlib.ExitStack() as stack:
        mine = [stack.enter_context(engines.place(ME)) for _ in range(3)]
        assert [p.wait(0) for p in mine] == [True, True, False]
        assert stack.enter_context(engines.place(YOU)).wait(0)


def test_a_turn_is_over_only_when_another_certificate_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines(1)
    with engines.place(ME) as place, contextlib.ExitStack() as stack:
        stack.enter_context(engines.place(ME))
        assert not place.over()
        monkeypatch.setattr(limits, "TURN_SECONDS", -1.0)
        assert not place.over()  # its own sessions may wait
        stack.enter_context(engines.place(YOU))
        assert place.over()
        monkeypatch.setattr(limits, "TURN_SECONDS", TURN_SECONDS)
        assert not place.over()


def test_who_waits_hears_of_a_free_process() -> None:
    engines, heard = Engines(1), threading.Event()
    with contextlib.ExitStack() as first:
        first.enter_context(engines.place(ME))

        def wait() -> None:
            with engines.place(YOU) as place:
                if place.wait(HANG):
                    heard.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert eventually(lambda: engines.wanted(ME))
        first.close()
        assert heard.wait(HANG)
        thread.join(HANG)
