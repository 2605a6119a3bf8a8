"""A party that dies or hangs at any step of an inference: one error at the other, one item burned, none used twice."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.errors import ShoalError
from shoal.private.protocol.layout import Layout
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS
from shoal.private.transport.wire import SocketWire
from tests.support.dealing import stock
from tests.support.forked import STEPS, TURNS, ask, forked, heard, serve
from tests.support.parties import Case
from tests.support.processes import in_thread
from tests.support.tables import fast_where
from tests.support.waiting import HANG, eventually

GONE, SILENT = "gone|silent", "no answer|silent"
WAITED = ("in time", "timed out")
"""What an error says when it was a limit that ended the wait, and not the end of the peer."""
UNITS = 12


def right(net: Case, logits: np.ndarray) -> bool:
    return bool(np.abs(logits - net.truth(len(logits))).max() <= UNITS * net.unit)


def noticed_at_once(error: object) -> bool:
    """Whether the death itself ended the wait: limits are minutes where a test gives none."""
    return not any(word in str(error) for word in WAITED)


def spent(folder: Path) -> list[str]:
    ledger = folder / "spent"
    return ledger.read_text().split() if ledger.exists() else []


def ready(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.item"))


def oldest(folder: Path) -> Path:
    """The item that a query takes next."""
    return min(folder.glob("*.item"), key=lambda path: (path.stat().st_mtime_ns, path.name))


def burned(folder: Path, name: str) -> bool:
    """Whether the disk alone says that nobody can use it again."""
    return name in spent(folder) and not list(folder.glob(f"{name}*"))


class Site:
    """A client's and a server's pool with the same items, and what must hold of them after any crash."""

    def __init__(self, net: Case, certs: dict[str, TLS], root: Path, count: int) -> None:
        self.net, self.certs, self.mine, self.theirs = net, certs, root / "client", root / "server"
        self.folders = stock(net, self.mine, self.theirs, certs["client"].cert, count)
        self.image = net.images[:1].numpy()

    def server(self, **more: Any) -> Server:
        return Server(self.net.folder, "127.0.0.1:0", self.certs["server"], ServerOptions(pool=self.theirs, **more))

    def client(self, address: str, **more: Any) -> Client:
        return Client(self.net.folder, address, self.certs["client"], ClientOptions(pool=self.mine, **more))

    def next_session_is_right(self, address: str) -> None:
        before = [set(spent(folder)) for folder in self.folders]
        with self.client(address) as client:
            assert right(self.net, client.query(self.image).logits)
        assert eventually(lambda: ready(self.folders[0]) == ready(self.folders[1]))
        for folder, old in zip(self.folders, before, strict=True):
            names = spent(folder)
            assert len(names) == len(set(names)) == len(old) + 1
            assert not set(names) & set(ready(folder))
            assert not [*folder.glob("*.claimed"), *folder.glob("*.staged")]


@pytest.fixture(scope="module")
def site(small: Case, certs: dict[str, TLS], tmp_path_factory: pytest.TempPathFactory, spu: None) -> Site:
    return Site(small, certs, tmp_path_factory.mktemp("site"), 3 * len(STEPS))


@pytest.fixture(scope="module")
def lasting(
    small: Case, certs: dict[str, TLS], tmp_path_factory: pytest.TempPathFactory, spu: None
) -> Iterator[tuple[Site, Server]]:
    """One server for every client that dies."""
    site = Site(small, certs, tmp_path_factory.mktemp("lasting"), 2 * len(STEPS))
    with in_thread(site.server()) as server:
        yield site, server


def test_the_steps_are_all_there_are(small: Case) -> None:
    assert Layout(small.program).online.latencies == TURNS


@pytest.mark.private
@pytest.mark.parametrize("step", fast_where(lambda step: step in ("claimed", "told", "message 5"), STEPS))
def test_a_client_dies_at_any_step(lasting: tuple[Site, Server], step: str) -> None:
    site, alive = lasting
    mine, theirs = site.folders
    copy, errors = (item := oldest(mine)).read_bytes(), len(alive.errors)
    fate = site.mine, alive.address, site.image, step, signal.SIGKILL
    with forked(ask, site.net.folder, site.certs["client"], *fate) as (process, _):
        process.join(HANG)
        assert process.exitcode == -signal.SIGKILL
    assert eventually(lambda: not alive._sessions)
    (error,) = alive.errors[errors:]
    assert "found the client at 127.0.0.1 " in error
    assert any(word in error for word in GONE.split("|"))
    assert noticed_at_once(error)
    # On disk, before anything is cleaned up: what was claimed is gone for good.
    assert burned(mine, item.stem) == (step not in ("told", "claim"))
    assert burned(theirs, item.stem)  # the client tells before it claims
    if burned(mine, item.stem):
        item.write_bytes(copy)  # somebody puts a backup back
    site.next_session_is_right(alive.address)
    assert item.stem not in ready(mine) + ready(theirs)


@pytest.mark.private
@pytest.mark.parametrize("step", fast_where(lambda step: step in ("claimed", "told", "message 5"), STEPS))
def test_a_server_dies_at_any_step(site: Site, step: str) -> None:
    mine, theirs = site.folders
    name = oldest(mine).stem
    copy = (item := theirs / f"{name}.item").read_bytes()
    with forked(serve, site.net.folder, site.certs["server"], site.theirs, step, signal.SIGKILL) as (process, pipe):
        with site.client(heard(pipe)) as client:
            if step == "done":  # all was said
                assert right(site.net, client.query(site.image).logits)
            with pytest.raises(ShoalError, match=f"found the server at .*({GONE}).*; need") as caught:
                client.query(site.image)
            assert noticed_at_once(caught.value)
            with pytest.raises(ShoalError, match="no open session"):
                client.query(site.image)
        process.join(HANG)
        assert process.exitcode == -signal.SIGKILL
    assert burned(mine, name)
    assert burned(theirs, name) == (step != "claim")
    if step != "claim":
        item.write_bytes(copy)
    with in_thread(site.server()) as server:
        site.next_session_is_right(server.address)
        assert server.errors == []
    assert name not in ready(mine) + ready(theirs)


@pytest.mark.private
def test_a_server_killed_from_outside_under_a_slow_client(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SocketWire._both
    with forked(serve, site.net.folder, site.certs["server"], site.theirs) as (process, pipe):

        def slowly(wire: SocketWire, mine: np.ndarray | None, words: int) -> np.ndarray:
            time.sleep(0.05)  # the server waits for us
            if wire.turn == TURNS // 2:
                process.kill()
            return real(wire, mine, words)

        with site.client(heard(pipe)) as client, monkeypatch.context() as patch:
            patch.setattr(SocketWire, "_both", slowly)
            with pytest.raises(ShoalError, match=GONE):
                client.query(site.image)
    with in_thread(site.server()) as server:
        site.next_session_is_right(server.address)


@pytest.mark.private
@pytest.mark.parametrize("step", ["told", "message 6"])
def test_a_client_that_hangs_is_given_up_in_time(site: Site, step: str) -> None:
    with in_thread(site.server(timeout_s=0.4)) as server:
        fate = site.mine, server.address, site.image, step, signal.SIGSTOP
        with forked(ask, site.net.folder, site.certs["client"], *fate):
            assert eventually(lambda: server.errors)
        assert any(word in server.errors[0] for word in SILENT.split("|"))
        assert not noticed_at_once(server.errors[0])
        server.local = replace(server.local, timeout_s=HANG)
        site.next_session_is_right(server.address)


@pytest.mark.private
@pytest.mark.parametrize("step", ["claimed", "message 6"])
def test_a_server_that_hangs_is_given_up_in_time(site: Site, step: str) -> None:
    fate = site.theirs, step, signal.SIGSTOP
    with (
        forked(serve, site.net.folder, site.certs["server"], *fate) as (_, pipe),
        site.client(heard(pipe), timeout_s=0.4) as client,
    ):
        with pytest.raises(ShoalError, match=SILENT) as caught:
            client.query(site.image)
        assert not noticed_at_once(caught.value)
    with in_thread(site.server()) as server:
        site.next_session_is_right(server.address)
