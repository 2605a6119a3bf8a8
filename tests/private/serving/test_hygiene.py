"""What must not pass between the parties, or from a peer to the log; and old items, forks, and many open files."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import ShoalError
from shoal.private.monitoring.metrics import Metrics
from shoal.private.program.program import Weights
from shoal.private.protocol import pool as pool_module
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.pool import PLAN_VERSION, Pool
from shoal.private.serving.client import Client
from shoal.private.serving.journal import Journal
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.pools import own_name
from shoal.private.serving.server import HIDDEN, Server
from shoal.private.serving.session import Session
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import Channel, first_ready
from shoal.private.transport.wire import SocketWire
from tests.support.dealing import deal, folders, stock
from tests.support.parties import Case
from tests.support.processes import in_thread
from tests.support.waiting import HANG


@pytest.mark.private
@pytest.mark.parametrize("task", ["query", "prepare"])
def test_no_path_of_the_server_reaches_a_client(
    small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None, task: str
) -> None:
    _, theirs = folders(small, tmp_path / "c", tmp_path / "secret", certs["client"].cert)
    theirs.rmdir()
    theirs.write_text("a file where the pool should be")
    options = ServerOptions(pool=tmp_path / "secret")
    with in_thread(Server(small.folder, "127.0.0.1:0", certs["server"], options)) as server:
        client = Client(small.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c"))
        with pytest.raises(ShoalError) as caught:
            client.open() if task == "query" else client.prepare(1)
        client.close()
        assert str(caught.value) == HIDDEN
        assert "secret" in server.errors[-1]


def test_control_characters_do_not_reach_the_log(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(Metrics(dict), threading.Event())
    with caplog.at_level(logging.INFO):
        journal.refused("room", "a\x1b]0;owned\x07b\r\nFAKE LINE")
        journal.failed("peer", ShoalError("c\x1b[31md"))
    assert journal.errors == ["a?]0;owned?b??FAKE LINE", "c?[31md"]
    assert [record.getMessage() for record in caplog.records] == journal.errors


# ---------------------------------------------------------------- items of other weights and versions


@pytest.fixture
def swapped(small: Case, tmp_path: Path) -> Path:
    """The same artifact after somebody put other weights under its program."""
    shutil.copytree(small.folder / "server", tmp_path / "server")
    arrays = {k: v.copy() for k, v in small.weights.arrays.items()}
    arrays["last.weight"] += np.random.default_rng(3).integers(-50, 50, arrays["last.weight"].shape)
    Weights(arrays).save(tmp_path / "server")
    return tmp_path / "server"


@pytest.mark.private
def test_items_of_other_weights_are_dropped_at_both_parties(
    small: Case, swapped: Path, certs: dict[str, TLS], tmp_path: Path, spu: None, caplog: pytest.LogCaptureFixture
) -> None:
    mine, theirs = stock(small, tmp_path / "c", tmp_path / "s", certs["client"].cert, 2)
    with in_thread(Server(swapped, "127.0.0.1:0", certs["server"], ServerOptions(pool=tmp_path / "s"))) as server:
        own = ClientOptions(pool=tmp_path / "c")
        client = Client(small.folder, server.address, certs["client"], own)
        with client:
            assert client.ready == 0
    assert not [path for folder in (mine, theirs) for path in folder.glob("*.item")]
    assert "found 2 prepared items of other weights or another version" in caplog.text


def test_an_item_staged_for_other_weights_is_refused_when_it_is_claimed(small: Case, tmp_path: Path) -> None:
    names = deal(small, (tmp_path / "c", made(tmp_path / "s")), 1)
    pool = Pool(tmp_path / "fresh", Layout(small.program), False, weights="0" * 64)
    (tmp_path / "s" / f"{names[0]}.staged").rename(pool.folder / f"{names[0]}.item")
    with pytest.raises(ShoalError, match=r"found another item, program, weights or version at .*prepare again"):
        pool.claim(names[0])
    pool.close()


def made(folder: Path) -> Path:
    for one in (folder, folder.parent / "c"):
        one.mkdir()
    return folder


def test_items_of_another_version_are_dropped_by_either_party(
    small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "PLAN_VERSION", f"{PLAN_VERSION}-before")
        deal(small, (tmp_path / "c", made(tmp_path / "s")), 2)
    for folder, client in (("c", True), ("s", False)):
        pool = Pool(tmp_path / folder, Layout(small.program), client, weights="" if client else small.weights.digest())
        assert (pool.dropped, pool.everything()) == (2, [])
        pool.close()


@pytest.mark.private
def test_parties_with_other_versions_of_items_do_not_begin(
    small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None
) -> None:
    options = ServerOptions(pool=tmp_path / "s")
    with in_thread(Server(small.folder, "127.0.0.1:0", certs["server"], options)) as server:
        client = Client(small.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c"))
        client.local.terms["items"] = "shoal-item-0"
        with pytest.raises(ShoalError, match=r"found items shoal-item-0 at the client and .*use one version of shoal"):
            client.open()
        client.close()


# ---------------------------------------------------------------- forks, descriptors, names


@pytest.mark.private
def test_a_forked_process_uses_neither_the_pool_nor_the_session(
    small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None
) -> None:
    stock(small, tmp_path / "c", tmp_path / "s", certs["client"].cert, 1)
    options = ServerOptions(pool=tmp_path / "s")
    image = small.images[:1].numpy()
    with in_thread(Server(small.folder, "127.0.0.1:0", certs["server"], options)) as server:
        client = Client(small.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c"))
        with client:
            assert client.pool is not None
            pool, (name,) = client.pool, client.pool.names()
            tries = {
                "a client made by the process": [
                    lambda: client.query(image),
                    lambda: client.open(),
                    lambda: client.prepare(1),
                ],
                "opened by the process": [
                    lambda: pool.claim(name),
                    lambda: pool.agree([]),
                    lambda: pool.commit([name]),
                    lambda: pool.making().__enter__(),
                ],
            }
            said = in_child(lambda: [why(work) for works in tries.values() for work in works], client.close)
            wanted = [match for match, works in tries.items() for _ in works]
            assert len(said) == len(wanted)
            assert all(match in text for match, text in zip(wanted, said, strict=True))
            client.query(image)  # the child closed its copy, and the parent's session goes on


def why(work: object) -> str:
    try:
        work()  # type: ignore[operator]
    except ShoalError as error:
        return str(error)
    return "nothing"


def in_child(work: object, last: object) -> list[str]:
    """What `work` returns, after `last`, in a process forked from this one."""
    out, into = os.pipe()
    if (child := os.fork()) == 0:
        try:
            said = work()  # type: ignore[operator]
            last()  # type: ignore[operator]
            os.write(into, "\n".join(said).encode())
        finally:
            os._exit(0)  # even after an error: the child must not go on with this test
    os.close(into)
    with os.fdopen(out) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text.splitlines()


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"needs 2,048 open files, and this system allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_sockets_above_1023_work_like_others(many_files: None) -> None:
    pair = []
    for number, sock in enumerate(socket.socketpair(), 1500):
        with sock:
            pair.append(Channel(socket.socket(fileno=os.dup2(sock.fileno(), number)), "the peer"))
    assert [channel.sock.fileno() for channel in pair] == [1500, 1501]
    assert first_ready([pair[0]], 0) is None
    pair[1].send({"type": "x"})
    assert first_ready(pair, HANG) is pair[0]
    assert Session(pair[0], threading.Event()).from_peer(("x",), HANG) == {"type": "x"}
    words = np.arange(1 << 19, dtype=np.uint64)  # more than a socket's buffers hold
    with ThreadPoolExecutor(2) as both:
        found = list(both.map(lambda channel: SocketWire(channel, HANG).exchange(words), pair))
    assert all((got == words).all() for got in found)
    for channel in pair:
        channel.close()


def test_one_name_is_made_whole_by_the_first_of_many(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        names = set(threads.map(lambda _: own_name(tmp_path), range(32)))
    assert len(names) == 1
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == names.pop()


def test_a_name_that_cannot_be_written_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ShoalError, match=r"No space left.*need a writable folder"):
            own_name(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "client-id").write_text("junk")
    with pytest.raises(ShoalError, match="found 'junk'"):
        own_name(tmp_path)
