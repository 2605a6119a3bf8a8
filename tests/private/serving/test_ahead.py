"""The next item, read and perhaps claimed before its query: nothing is spent twice, and only what is stated is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.errors import ShoalError
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.pool import Pool
from shoal.private.serving.ahead import Ahead, Background
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.prepared import PreparedQueries
from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS
from tests.support.dealing import stock
from tests.support.parties import Case
from tests.support.processes import in_thread
from tests.support.waiting import HANG, eventually

UNITS = 12


class Site:
    """A client's and a server's pool with the same three items, and a server."""

    def __init__(self, net: Case, certs: dict[str, TLS], root: Path) -> None:
        self.net, self.tls, self.root = net, certs["client"], root
        self.folders = stock(net, root / "client", root / "server", self.tls.cert, 3)
        self.server = Server(net.folder, "127.0.0.1:0", certs["server"], ServerOptions(pool=root / "server"))

    def client(self, **more: Any) -> Client:
        options = ClientOptions(pool=self.root / "client", **more)
        return Client(self.net.folder, self.server.address, self.tls, options)

    def query(self, client: Client) -> None:
        logits = client.query(self.net.images[:1].numpy()).logits
        assert np.abs(logits - self.net.truth(1)).max() <= UNITS * self.net.unit

    def spent(self) -> list[int]:
        """How many different names each party has spent; none of them is on its disk any more."""
        counts = []
        for folder in self.folders:
            names = (folder / "spent").read_text().split() if (folder / "spent").exists() else []
            assert len(names) == len(set(names))
            assert not [name for name in names if list(folder.glob(f"{name}*"))]
            counts.append(len(names))
        return counts


@pytest.fixture
def site(small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None) -> Site:
    return Site(small, certs, tmp_path)


@pytest.fixture
def pool(small: Case, certs: dict[str, TLS], tmp_path: Path) -> Pool:
    mine, _ = stock(small, tmp_path / "client", tmp_path / "server", certs["client"].cert, 3)
    return Pool(mine, Layout(small.program), True)


def queries_of(client: Client) -> PreparedQueries:
    assert isinstance(client._queries, PreparedQueries)
    return client._queries


@pytest.mark.private
def test_what_is_read_ahead_is_neither_spent_nor_lost(site: Site) -> None:
    with in_thread(site.server):
        for count in (1, 2):
            with site.client() as client:
                queries_of(client).next.wait()
                assert queries_of(client).next.ahead.name == client.pool.names()[0]  # type: ignore[union-attr]
                site.query(client)
                queries_of(client).next.wait()
                assert queries_of(client).next.ahead.name is not None
            assert site.spent() == [count, count]


@pytest.mark.private
def test_what_is_claimed_ahead_is_spent_before_its_query_and_lost_without_one(site: Site) -> None:
    with in_thread(site.server):
        with site.client(claim_ahead=True) as client:
            for count in (1, 2):
                site.query(client)
                queries_of(client).next.wait()
                assert eventually(lambda count=count: site.spent() == [count + 1, count + 1])  # type: ignore[misc]
                assert client.ready == 3 - count
            assert client.pool is not None
            assert client.pool.names() == []
        with site.client() as client:
            assert client.ready == 0
    assert site.spent() == [3, 3]
    assert site.server.errors == []


@pytest.mark.private
@pytest.mark.parametrize("name", ["../x", "0" * 32 + "-000000"])
def test_a_server_asked_to_claim_what_it_has_not_ends_the_session_only(site: Site, name: str) -> None:
    with in_thread(site.server):
        with site.client() as client:
            queries = queries_of(client)
            real = queries.session.control.send
            queries.session.control.send = lambda m, p=b"": real(m | {"next": name, "claim": True}, p)  # type: ignore[method-assign,misc]
            site.query(client)
            with pytest.raises(ShoalError, match=r"server's log|gone"):
                queries.session.from_peer(("go",), HANG)
        with site.client() as client:
            site.query(client)
    assert site.spent() == [2, 2]


def test_an_item_read_ahead_is_not_read_again_and_serves_once(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    names, ahead = pool.names() or pool.agree(pool.everything()), Ahead(pool)
    whole = {key: array.copy() for key, array in pool.look(names[0]).items()}
    ahead.fetch(names[0], claim=False)
    assert pool.names() == names
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "_read", None)
        half = ahead.take(names[0])
    assert half.keys() == whole.keys()
    assert all((half[key] == whole[key]).all() for key in whole)
    assert pool.names() == names[1:]
    with pytest.raises(ShoalError, match="used already"):
        ahead.take(names[0])
    pool.close()


def test_an_item_that_was_spent_meanwhile_is_refused_although_it_was_read(pool: Pool) -> None:
    name, ahead = pool.names()[0], Ahead(pool)
    ahead.fetch(name, claim=False)
    pool.claim(name)
    with pytest.raises(ShoalError, match="used already"):
        ahead.take(name)
    pool.close()


def test_one_item_is_claimed_ahead_at_a_time(pool: Pool) -> None:
    (one, two, three), ahead = pool.names(), Ahead(pool)
    ahead.fetch(one, claim=True)
    with pytest.raises(ShoalError, match="claimed ahead already"):
        ahead.fetch(two, claim=True)
    assert ahead.take(one) is not None
    ahead.fetch(two, claim=True)
    assert ahead.take(three) is not None  # the other one is lost
    assert pool.names() == []
    pool.close()


def test_an_agreement_keeps_what_only_one_party_has_claimed_ahead(pool: Pool) -> None:
    first, *others = pool.names()
    background = Background(pool)
    background.ask(first)
    assert pool.agree(others) == [first, *others]  # the server has claimed it, this party has not
    background.start(first, claim=True)
    background.wait()
    assert pool.listed() == [first, *others]  # now it is the other way round, for all that this party knows
    background.end()
    assert pool.listed() == others
    pool.close()


def test_a_claim_that_fails_in_the_thread_is_reported_by_the_next_query(pool: Pool) -> None:
    background, name = Background(pool), pool.names()[0]
    pool.claim(name)
    background.start(name, claim=True)
    with pytest.raises(ShoalError, match="used already"):
        background.wait()
    background.wait()  # once
    pool.close()
