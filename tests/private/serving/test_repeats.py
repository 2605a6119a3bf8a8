"""What must never come twice, whatever crashes or starts again: seeds, names, items, masks."""

from __future__ import annotations

from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from shoal.errors import ShoalError
from shoal.private.program.program import Program
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.pool import Pool
from shoal.private.protocol.randomness import new_seed
from shoal.private.serving import prepared
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS
from shoal.private.transport.wire import SocketWire
from tests.support.dealing import CLIENT, SERVER, stock
from tests.support.forked import forked, heard, serve
from tests.support.parties import Case
from tests.support.processes import in_thread
from tests.support.waiting import HANG


def draw(pipe: Connection, folder: Path, pool: Path) -> None:
    """Say 200 seeds, and the names that a preparation without SPU gives its 20 items."""
    prepared._make = lambda *_: None  # type: ignore[assignment,misc]
    session = Mock()
    session.from_peer.return_value = {"type": "go"}
    prepared.prepare(session, Mock(), Pool(pool, Layout(Program.load(folder)), CLIENT), prepared.Request(20, 7))
    names = [name for call in session.control.send.call_args_list for name in call.args[0]["names"]]
    pipe.send(([new_seed() for _ in range(200)], names))


def test_no_seed_and_no_name_comes_twice_whatever_the_process(small: Case, tmp_path: Path) -> None:
    seeds: Counter[bytes] = Counter()
    names: Counter[str] = Counter()
    for i in (0, 1, 2, 2, 2):  # three processes, one of them started three times, on the same folder
        with forked(draw, small.folder / "client", tmp_path / str(i)) as (_, pipe):
            some, more = heard(pipe)
            seeds.update(some)
            names.update(more)
    assert (len(seeds), seeds.total()) == (1000, 1000)
    assert (len(names), names.total()) == (100, 100)
    assert len({name[:32] for name in names}) == 15  # a base for each batch of 7, 7 and 6


@pytest.mark.private
@pytest.mark.parametrize("who", [CLIENT, SERVER])
def test_an_item_put_back_is_refused_by_a_party_that_starts_again(
    small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None, who: bool
) -> None:
    folders = stock(small, tmp_path / "c", tmp_path / "s", certs["client"].cert, 3)
    copies = {path: path.read_bytes() for path in folders[not who].glob("*.item")}
    image = small.images[:1].numpy()
    for _ in range(2):
        with (
            forked(serve, small.folder, certs["server"], tmp_path / "s") as (_, pipe),
            Client(small.folder, heard(pipe), certs["client"], ClientOptions(pool=tmp_path / "c")) as client,
        ):
            client.query(image)
    used = (folders[0] / "spent").read_text().split()
    for path, data in copies.items():
        path.write_bytes(data)
    with in_thread(Server(small.folder, "127.0.0.1:0", certs["server"], ServerOptions(pool=tmp_path / "s"))) as server:
        for name in used:
            with Client(small.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c")) as client:
                assert client._queries is not None
                assert set(used).isdisjoint(client.pool.names())
                path = folders[not who] / f"{name}.item"
                path.write_bytes(copies[path])  # the session's agreement has removed the first copy
                if who == CLIENT:
                    with pytest.raises(ShoalError, match=f"{name} used already"):
                        client.pool.claim(name)
                else:
                    client._queries.session.control.send({"type": "infer", "name": name})
                    with pytest.raises(ShoalError, match="server's log"):
                        client._queries.session.from_peer(("go",), HANG)
                    assert f"{name} used already" in server.errors[-1]
        with Client(small.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c")) as client:
            client.query(image)
    for folder in folders:
        assert not list(folder.glob("*.item"))
        assert len((folder / "spent").read_text().split()) == 3


@pytest.mark.private
def test_every_word_of_the_first_message_is_new(
    small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock(small, tmp_path / "c", tmp_path / "s", certs["client"].cert, 4)
    real, first = SocketWire.send, list[np.ndarray]()

    def sending(self: SocketWire, mine: np.ndarray) -> None:
        if self.turn == 0:
            first.append(mine.copy())
        real(self, mine)

    monkeypatch.setattr(SocketWire, "send", sending)
    for _ in range(2):
        with (
            forked(serve, small.folder, certs["server"], tmp_path / "s") as (_, pipe),
            Client(small.folder, heard(pipe), certs["client"], ClientOptions(pool=tmp_path / "c")) as client,
        ):
            client.query(small.images[[0, 0]].numpy())
    assert len(first) == 4
    words = np.concatenate(first)
    assert words.size == 4 * 64
    assert len(set(words.tolist())) == words.size  # 256 of 2^64 words: two meet once in 10^14 runs
