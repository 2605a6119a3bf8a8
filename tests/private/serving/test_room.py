"""Room at a server: no pool, no certificate and no batch takes more disk or memory than its limit."""

from __future__ import annotations

import socket
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from shoal.private.protocol.layout import Layout
from shoal.private.protocol.pool import Pool
from shoal.private.serving import prepared, room
from shoal.private.serving.client import Client
from shoal.private.serving.limits import Place
from shoal.private.serving.options import GIB, ClientOptions, ServerOptions
from shoal.private.serving.prepared import MAX_LIST, Allowance, Offline, Request, prepare, serve_preparation
from shoal.private.serving.room import ENGINE_BYTES, SPARE, Room, available_memory, estimate_memory
from shoal.private.serving.server import Server
from shoal.private.serving.session import RefusedError, Session
from shoal.private.serving.spu_link import Local
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import Channel
from tests.support.parties import Case
from tests.support.waiting import HANG

ME, YOU = "a" * 16, "b" * 16
Usage = namedtuple("Usage", "free")


@pytest.fixture
def pool(small: Case, tmp_path: Path) -> Pool:
    return Pool(tmp_path / "program" / f"{ME}-{'0' * 16}", Layout(small.program), False)


def item(pool: Pool) -> int:
    return pool.layout.stored_bytes(False)


def refused(rooms: Room, pool: Pool, identity: str, count: int, match: str) -> None:
    with pytest.raises(RefusedError, match=match), rooms.for_items(pool, identity, count):
        pass


def test_promises_and_files_of_a_certificate_count_together(pool: Pool, tmp_path: Path) -> None:
    rooms = Room(tmp_path, ServerOptions(certificate_gib=4.5 * item(pool) / GIB, disk_gib=9.5 * item(pool) / GIB))
    (pool.folder / "spent").write_bytes(bytes(item(pool)))
    other = tmp_path / "another program" / f"{ME}-{'1' * 16}"
    other.mkdir(parents=True)
    (other / "x.item").write_bytes(bytes(item(pool)))
    refused(rooms, pool, ME, 3, r"GiB of this certificate's items at the server; need at most .* query first")
    with rooms.for_items(pool, ME, 1):
        refused(rooms, pool, ME, 2, "of this certificate's items")
        with rooms.for_items(pool, ME, 1):
            pass
    with rooms.for_items(pool, ME, 2):
        pass  # promises end


def test_all_certificates_share_the_disk(pool: Pool, tmp_path: Path) -> None:
    rooms = Room(tmp_path, ServerOptions(certificate_gib=1.0, disk_gib=4.5 * item(pool) / GIB))
    with rooms.for_items(pool, ME, 3):
        refused(rooms, pool, YOU, 2, "found the server's disk for prepared items full; need room")
        with rooms.for_items(pool, YOU, 1):
            pass


def test_the_last_bytes_of_a_disk_are_kept_for_the_ledgers(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(SPARE + item(pool)))
    rooms = Room(tmp_path, ServerOptions())
    refused(rooms, pool, ME, 2, "disk for prepared items full")
    with rooms.for_items(pool, ME, 1):
        refused(rooms, pool, YOU, 1, "disk for prepared items full")


def test_memory_is_estimated_before_work_starts(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = pool.layout
    one, two = (estimate_memory(layout, batch) for batch in (1, 2))
    assert ENGINE_BYTES < one < two
    assert two - one >= layout.stored_bytes(True)
    rooms = Room(tmp_path, ServerOptions(products="spu", memory_gib=(one + two) / GIB))
    with rooms.for_batch(layout, 2):
        with pytest.raises(RefusedError, match=r"need about 1.5 GiB for batches of 2; ask"), rooms.for_batch(layout, 2):
            pass
        with rooms.for_batch(layout, 1):
            pass
    with rooms.for_batch(layout, 2):
        pass
    rooms = Room(tmp_path, ServerOptions(products="spu"))
    monkeypatch.setattr(room, "available_memory", lambda: one)
    with pytest.raises(RefusedError, match="need about"), rooms.for_batch(layout, 2):
        pass
    with rooms.for_batch(layout, 1):
        pass
    # SEAL's workers keep weights, up to the limit of their cache.
    with pytest.raises(RefusedError, match="need about"), Room(tmp_path, ServerOptions()).for_batch(layout, 1):
        pass
    with Room(tmp_path, ServerOptions(weight_cache_gib=0.0)).for_batch(layout, 1):
        pass


def test_the_machines_own_memory_is_known() -> None:
    assert 1 << 20 < available_memory() < 1 << 50


# ---------------------------------------------------------------- turns


@pytest.mark.private
def test_a_session_whose_turn_is_over_ends_between_two_batches(
    pool: Pool, small: Case, tmp_path: Path, spu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(prepared, "link_as_server", lambda *arguments: None)
    monkeypatch.setattr(prepared, "_make", lambda session, local, pool, names: {"sent": 0, "received": 0})
    monkeypatch.setattr(Place, "over", lambda place: True)
    mine, theirs = (Session(Channel(sock, "the peer", MAX_LIST), threading.Event()) for sock in socket.socketpair())
    options = ServerOptions(insecure=True, pool=tmp_path, timeout_s=20.0)
    server = Server(small.folder, "127.0.0.1:0", None, options)
    with server, server.engines.place(ME) as place:
        own = Pool(tmp_path / "c", pool.layout, True)
        allowance = Allowance(place, server.room)
        arguments = (theirs, server.local, {"batch": 2}, pool, allowance, lambda count, *_: made.append(count))
        thread = threading.Thread(target=serve_preparation, args=arguments)
        thread.start()
        cost = prepare(mine, server.local, own, Request(5, 2))
        thread.join(HANG)
        assert made == [2]  # a turn has at least one batch, or nobody would ever finish
        assert cost.items == 2
        own.close()
        for session in (mine, theirs):
            session.end()


def test_the_rest_of_a_request_counts_on() -> None:
    heard: list[tuple[int, int]] = []
    rest = Request(5, 2, lambda *told: heard.append(told)).rest(2)
    assert (rest.count, rest.batch) == (3, 2)
    assert rest.progress is not None
    rest.progress(1, 3)
    assert heard == [(3, 5)]
    assert Request(5, 2).rest(2).progress is None


@pytest.mark.private
def test_a_client_goes_on_after_its_turn(
    small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def make(client: Client, local: Local, request: Request) -> Offline:
        asked.append(request.count)
        return Offline([(2, {})] if request.count > 2 else [(request.count, {})])

    monkeypatch.setattr(Client, "_prepare", make)
    client = Client(small.folder, "127.0.0.1:9", certs["client"], ClientOptions(pool=tmp_path))
    assert client.prepare(5, batch=2).items == 5
    assert asked == [5, 3, 1]
    client.close()
