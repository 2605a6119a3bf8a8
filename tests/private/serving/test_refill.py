"""A pool that stays filled: between a client's queries, and by a process of its own."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import ShoalError
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.refill import Backoff, Refill
from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import listen
from tests.support.dealing import stock
from tests.support.parties import Case, Small, case, seeded, small_mask
from tests.support.processes import in_thread, shoal, tls_words
from tests.support.waiting import HANG, eventually

UNITS = 12


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(seeded(Small), tmp_path_factory.mktemp("net"), {"relu": small_mask()})


def right(net: Case, logits: np.ndarray) -> bool:
    return bool(np.abs(logits - net.truth(len(logits))).max() <= UNITS * net.unit)


def test_no_batch_begins_while_a_query_runs_unless_it_waits_for_one() -> None:
    items, made = [0], threading.Event()

    def top_up(proceed: Callable[[], bool]) -> None:
        items[0] += 1
        made.set()

    refill = Refill(1, lambda: items[0], top_up)
    with refill.paused():
        refill.start()
        assert not made.wait(0.3)
        refill.await_item(HANG)
        assert items[0] == 1
        items[0] = 0
        made.clear()
        assert not made.wait(0.3)
    assert made.wait(HANG)
    assert refill.proceed()
    refill.close()
    assert not refill.proceed()


def test_attempts_after_failures_come_later_each_time_and_a_waiting_query_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backoff = Backoff()
    assert [backoff.failed(ShoalError("found it away")) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert "found it away; trying again in 60 s" in caplog.messages[-1]

    def away(proceed: Callable[[], bool]) -> None:
        raise ShoalError("found no server")

    refill = Refill(1, lambda: 0, away)
    refill.backoff = Backoff(2 * HANG, 2 * HANG)  # no attempt but those that a query asks for
    refill.start()
    refill.await_item(HANG)
    before = refill.backoff.failures
    refill.await_item(HANG)
    assert refill.backoff.failures > before > 0
    refill.close()
    assert "no server" in str(refill.error)


@pytest.mark.slow
@pytest.mark.private
def test_a_client_keeps_its_pool_between_queries(net: Case, certs: dict[str, TLS], tmp_path: Path, spu: None) -> None:
    stock(net, tmp_path / "c", tmp_path / "s", certs["client"].cert, 2)
    server = Server(net.folder, "127.0.0.1:0", certs["server"], ServerOptions(pool=tmp_path / "s"))
    with (
        in_thread(server),
        Client(net.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c", keep=2)) as client,
    ):
        assert right(net, client.query(net.images[:1].numpy()).logits)
        assert eventually(lambda: len(client.pool.names()) == 2)
        assert (client.refill_error, server.metrics.snapshot()["items_made"]) == (None, 1)
        server.room.options = replace(server.options, pool_gib=2**-30)  # a byte
        assert right(net, client.query(net.images[:1].numpy()).logits)
        assert eventually(lambda: "need room" in str(client.refill_error))
        assert right(net, client.query(net.images[:1].numpy()).logits)  # a failure to make items breaks no query
    assert client.refill_error is not None


@pytest.mark.slow
@pytest.mark.private
def test_a_process_keeps_a_pool_that_others_query(net: Case, certs: dict[str, TLS], tmp_path: Path, spu: None) -> None:
    stock(net, tmp_path / "c", tmp_path / "s", certs["client"].cert, 1)
    with contextlib.closing(listen("127.0.0.1:0")) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"  # free again after the block
    where = ["--connect", address, "--pool", tmp_path / "c", *tls_words(certs["client"])]
    with shoal("prepare", net.folder / "client", "--keep", 2, "--json", *where) as keeper:
        assert keeper.stderr is not None
        log = (json.loads(line) for line in keeper.stderr)
        assert next(line for line in log if line.get("event") == "refill_failed")["retry_s"] == 1  # nobody there yet
        with in_thread(Server(net.folder, address, certs["server"], ServerOptions(pool=tmp_path / "s"))):
            assert next((line["made"], line["ready"]) for line in log if "made" in line) == (1, 2)
            with Client(
                net.folder, address, certs["client"], ClientOptions(pool=tmp_path / "c", pool_wait_s=HANG)
            ) as client:
                assert right(net, client.query(net.images[:1].numpy()).logits)
            client.close()
            keeper.send_signal(signal.SIGTERM)
            assert keeper.wait(HANG) == 0
