"""Prepared queries between real processes: right logits, items used once, and what a party or a wire may not see."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.errors import ShoalError
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import connect
from shoal.private.transport.wire import HEADER, SocketWire
from tests.support.dealing import stock
from tests.support.forked import forked, go_on_asking, heard, serving
from tests.support.parties import Case, Everything, Small, case, seeded, small_mask
from tests.support.processes import children, gone, in_thread
from tests.support.waiting import HANG

UNITS = 12


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(seeded(Small), tmp_path_factory.mktemp("net"), {"relu": small_mask()})


@pytest.fixture(scope="module")
def address(net: Case, certs: dict[str, TLS], spu: None) -> Iterator[str]:
    with serving(net.folder, certs["server"]) as (_, found):
        yield found


def right(net: Case, logits: np.ndarray) -> bool:
    return bool(np.abs(logits - net.truth(len(logits))).max() <= UNITS * net.unit)


@pytest.mark.slow
@pytest.mark.private
def test_items_are_made_and_spent_and_nothing_held_or_heard_has_a_weight(
    net: Case, certs: dict[str, TLS], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(net.folder, address, certs["client"], ClientOptions(pool=tmp_path))
    seen: list[tuple[int, int]] = []
    client.prepare(5, batch=2, progress=lambda *both: seen.append(both))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    told = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    real = SocketWire._both

    def listening(wire: SocketWire, mine: np.ndarray | None, words: int) -> np.ndarray:
        told.append((got := real(wire, mine, words)).tobytes())
        return got

    monkeypatch.setattr(SocketWire, "_both", listening)
    with client:
        first = client.query(net.images[:1].numpy())
        three = client.query(net.images[:3].numpy())
        assert right(net, first.logits)
        assert right(net, three.logits)
        assert len(client.pool.names()) == 1
        assert (first.made, three.made) == (0, 0)
        assert three.bytes == 3 * first.bytes
        online = client.pool.layout.online
        assert (first.bytes, first.messages, first.latencies) == (online.bytes, online.messages, online.latencies)
        # Three exchanges a layer of signs, a message before each linear layer, the wraps of the logits, the logits.
        assert first.latencies == 2 * 3 + 3 + 1 + 1
        two = client.query(net.images[:2].numpy())  # the second image finds no item, so one is made for it
        assert right(net, two.logits)
        assert (two.made, len(client.pool.names())) == (1, 0)
        assert 0 < two.seconds < two.making_s
    spent = (client.pool.folder / "spent").read_text().split()
    assert len(spent) == len(set(spent)) == 6
    assert has_no_weight(b"".join(told), net)


def has_no_weight(data: bytes, net: Case) -> bool:
    """Whether no eight bytes of a weight, unless all the same, are in `data`."""
    assert len(data) > 10_000
    for array in net.weights.arrays.values():
        for form in (array.tobytes(), array.astype(np.int32).tobytes()):
            pieces = [form[i : i + 8] for i in range(0, len(form) - 7, 8)]
            if any(piece in data for piece in pieces if piece.strip(b"\0") and piece.strip(b"\xff")):
                return False
    return True


@pytest.mark.private
def test_the_servers_half_is_destroyed_too(net: Case, certs: dict[str, TLS], tmp_path: Path, spu: None) -> None:
    stock(net, tmp_path / "client", tmp_path / "server", certs["client"].cert, 2)
    server = Server(net.folder, "127.0.0.1:0", certs["server"], ServerOptions(pool=tmp_path / "server"))
    with in_thread(server):
        client = Client(net.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "client"))
        with client:
            client.query(net.images[:1].numpy())
            (folder,) = [path.parent for path in (tmp_path / "server").rglob("spent")]
            assert [p.stem for p in folder.glob("*.item")] == client.pool.names()
            # The client claims to have an item that the server used: refused there, and the client's own is burned.
            used = (folder / "spent").read_text().split()[0]
            assert client._queries is not None
            client._queries.session.control.send({"type": "infer", "name": used})
            with pytest.raises(ShoalError, match="server's log"):
                client._queries.session.from_peer(("go",), HANG)
        assert any("used already" in e for e in server.errors)


@pytest.mark.slow
@pytest.mark.private
def test_two_clients_at_once_mix_nothing(net: Case, certs: dict[str, TLS], address: str, tmp_path: Path) -> None:
    wrong: list[str] = []

    def work(i: int) -> None:
        client = Client(net.folder, address, certs["client"], ClientOptions(pool=tmp_path / str(i)))
        client.prepare(4, batch=4)  # one waits for the other: the server has one SPU process
        with client:
            for n in (1, 3):
                if not right(net, client.query(net.images[:n].numpy()).logits):
                    wrong.append(str(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.slow
@pytest.mark.private
@pytest.mark.parametrize("task", ["prepare", "query"])
def test_a_killed_client_leaves_a_usable_pool(
    net: Case, certs: dict[str, TLS], address: str, tmp_path: Path, task: str
) -> None:
    image, making = net.images[:1].numpy(), task == "prepare"
    stock(net, tmp_path, net.folder / "server" / "pool", certs["client"].cert, 6, ("b" if making else "a") * 16)
    asking = net.folder, certs["client"], address, tmp_path, image, 100 * making
    with forked(go_on_asking, *asking) as (process, pipe):
        assert heard(pipe) == ("made 1" if making else "open")
        workers = children(process.pid or 0)
        assert len(workers) == making
    assert all(gone(pid) for pid in workers)
    client = Client(net.folder, address, certs["client"], ClientOptions(pool=tmp_path))
    if making:
        client.prepare(1)
    with client:
        assert right(net, client.query(net.images[:1].numpy()).logits)


@pytest.mark.private
def test_a_killed_server_ends_a_query_at_once_and_the_pools_agree_again(
    net: Case, certs: dict[str, TLS], tmp_path: Path, spu: None
) -> None:
    mine, theirs = tmp_path / "client", net.folder / "server" / "pool"
    stock(net, mine, theirs, certs["client"].cert, 3)
    with serving(net.folder, certs["server"]) as (process, where):
        client = Client(net.folder, where, certs["client"], ClientOptions(pool=mine))
        with client:
            assert right(net, client.query(net.images[:1].numpy()).logits)
            process.kill()
            process.join(HANG)
            with pytest.raises(ShoalError) as caught:
                client.query(net.images[:1].numpy())
            assert "in time" not in str(caught.value)  # its end was noticed, no limit reached
    with serving(net.folder, certs["server"]) as (_, where):
        client = Client(net.folder, where, certs["client"], ClientOptions(pool=mine))
        with client:
            # One item was spent; a session that is known to have ended costs none.
            assert len(client.pool.names()) == 2
            assert right(net, client.query(net.images[:1].numpy()).logits)


@pytest.mark.private
@pytest.mark.parametrize("header", [(0, 1 << 31), (7, 512), (0, 0)])
def test_a_message_out_of_turn_ends_that_session_only(
    net: Case, certs: dict[str, TLS], tmp_path: Path, spu: None, header: tuple[int, int]
) -> None:
    stock(net, tmp_path / "c", tmp_path / "s", certs["client"].cert, 2)
    with in_thread(Server(net.folder, "127.0.0.1:0", certs["server"], ServerOptions(pool=tmp_path / "s"))) as server:
        disturb(Client(net.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c")), header)
        with Client(net.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c")) as again:
            assert right(net, again.query(net.images[:1].numpy()).logits)


def disturb(client: Client, header: tuple[int, int]) -> None:
    """Begin an inference and send a first message with this header."""
    with client:
        assert client._queries is not None
        session, name = client._queries.session, client.pool.names()[0]
        client.pool.claim(name)
        session.control.send({"type": "infer", "name": name})
        session.from_peer(("go",), HANG)
        session.control.sock.sendall(HEADER.pack(*header) + bytes(8 * 64))
        with pytest.raises(ShoalError, match=r"server's log|gone"):
            session.from_peer(("go",), HANG)


@pytest.mark.private
def test_what_the_server_refuses(net: Case, certs: dict[str, TLS], tmp_path: Path, spu: None) -> None:
    server = Server(
        net.folder,
        "127.0.0.1:0",
        certs["server"],
        ServerOptions(pool_gib=30_000 / 2**30, max_clients=1, pool=tmp_path / "s"),
    )
    with in_thread(server):
        client = Client(net.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c"))
        with client:
            other = Client(net.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "d"))
            with pytest.raises(ShoalError, match="1 clients at the server"):
                other.open()
        other.close()
    stock(net, tmp_path / "c", tmp_path / "s", certs["client"].cert, 3)
    server = Server(
        net.folder, "127.0.0.1:0", certs["server"], ServerOptions(pool_gib=30_000 / 2**30, pool=tmp_path / "s")
    )
    with in_thread(server):
        filled = Client(net.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c"))
        with pytest.raises(ShoalError, match="need room"):
            filled.prepare(1)
        filled.close()
        for hello in ({"task": "steal"}, {"task": "query", "client": "../../etc"}):
            control = connect(server.address, certs["client"], HANG, 1 << 18)
            control.send({"type": "hello", "terms": filled.local.terms} | hello)
            answer, _ = control.receive()
            assert answer["type"] == "error"
            control.close()


@pytest.mark.private
def test_early_exits_are_opt_in(certs: dict[str, TLS], tmp_path: Path, spu: None) -> None:
    two = case(seeded(Everything), tmp_path / "net", {"relu": torch.ones(4, 8, 8, dtype=torch.bool)})
    images = two.images[:3].numpy()
    stock(two, tmp_path / "c", tmp_path / "s", certs["client"].cert, 8)
    with in_thread(
        Server(two.folder, "127.0.0.1:0", certs["server"], ServerOptions(pool=tmp_path / "s", early_exit=True))
    ) as server:
        with Client(two.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c")) as client:
            whole = client.query(images)
            sure = 1 / np.exp(whole.exits[0] - whole.exits[0].max(1, keepdims=True)).sum(1)
            limit = float(np.sort(sure)[1])
            some = client.query(images, exit_above=limit - 1e-3)
        assert whole.taken == (1, 1, 1)
        assert some.taken == tuple(int(s < limit - 1e-3) for s in sure)
        assert some.bytes < whole.bytes
        for i, taken in enumerate(some.taken):
            assert np.isnan(some.exits[1][i]).all() == (taken == 0)
            assert np.abs(some.logits[i] - whole.exits[taken][i]).max() < 1e-3
    with in_thread(Server(two.folder, "127.0.0.1:0", certs["server"], ServerOptions(pool=tmp_path / "s"))) as server:
        client = Client(two.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c"))
        with client, pytest.raises(ShoalError, match="need a server that allows it"):
            client.query(images[:1], exit_above=0.5)
        assert any("--early-exit" in e for e in server.errors)
