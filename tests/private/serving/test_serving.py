"""What a server's operator relies on: figures that are true, an orderly end, and no secret in logs and figures."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from shoal.errors import ShoalError
from shoal.jobs.serve import JsonLines, share_cores
from shoal.private.monitoring.metrics import Histogram, Level, Metrics, exposition, short_name
from shoal.private.monitoring.monitor import Monitor
from shoal.private.protocol.layout import Layout
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.result import Result
from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import first_ready
from shoal.private.transport.wire import SocketWire
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


# ---------------------------------------------------------------- figures


@pytest.mark.private
def test_figures_equal_what_happened_and_tell_no_secret(
    net: Case, certs: dict[str, TLS], tmp_path: Path, spu: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stock(net, tmp_path / "c", tmp_path / "s", certs["client"].cert, 4)
    secrets, file = list(secrets_of(net, tmp_path)), tmp_path / "figures.json"
    room = 4 * Layout(net.program).stored_bytes(False)
    options = ServerOptions(pool=tmp_path / "s", pool_gib=room / 2**30, max_clients=1)
    server = Server(net.folder, "127.0.0.1:0", certs["server"], options)
    with Monitor(server.metrics.snapshot, file, 0, every_s=0.1) as monitor, in_thread(server):
        client = Client(net.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "c"))
        with pytest.raises(ShoalError, match="need room"):
            client.prepare(1)
        assert eventually(lambda: server.metrics.snapshot()["sessions_open"] == 0)
        with client:
            results = [client.query(net.images[:n].numpy()) for n in (1, 2)]
            other = Client(net.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / "d"))
            with pytest.raises(ShoalError, match="1 clients"):
                other.open()
            other.close()
            assert client._queries is not None
            client._queries.session.control.send({"type": "infer", "name": "f" * 32 + "-000000"})
        with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert eventually(lambda: "tls" in server.metrics.snapshot()["failures"])
        assert eventually(lambda: server.metrics.snapshot()["sessions_open"] == 0)
        body = server.metrics.snapshot()
        text = fetched(monitor)
    assert_counted(body, results)
    last = json.loads(file.read_text())
    assert {k: v for k, v in last.items() if k != "uptime_s"} == {k: v for k, v in body.items() if k != "uptime_s"}
    lines = "\n".join(JsonLines().format(record) for record in caplog.records)
    assert [json.loads(line)["event"] for line in lines.splitlines()].count("query") == 3
    for secret in secrets:
        assert not any(secret in told for told in (text, lines, file.read_text())), secret


def assert_counted(body: dict[str, Any], results: list[Result]) -> None:
    """Three queries, two refusals and two failures are in the figures, and one item is left."""
    assert (body["sessions"], body["queries"]) == ({"query": 1, "prepare": 1}, 3)
    assert (body["refusals"], body["failures"]) == ({"room": 1, "clients": 1}, {"session": 1, "tls": 1})
    assert sum(body["bytes"]["query"].values()) == sum(r.bytes for r in results)
    assert body["query_seconds"]["count"] == 3
    assert 0 < body["query_seconds"]["sum"] < sum(r.seconds for r in results) + 1
    assert [pool["items"] for pool in body["pools"].values()] == [1]
    assert all(len(name) == 8 for name in body["pools"])


def secrets_of(net: Case, folder: Path) -> Iterator[str]:
    """Names and seeds of items, names of clients and of their pools, and weights."""
    yield (folder / "c" / "client-id").read_text()
    yield from (path.name for path in (folder / "s").glob("*/*"))
    for path in folder.rglob("*.item"):
        yield path.stem
        with safe_open(path, framework="np") as file:
            if "seed" in file.keys():  # noqa: SIM118 - not a mapping
                yield file.get_tensor("seed").tobytes().hex()
    yield from (str(w) for array in net.weights.arrays.values() for w in array.ravel() if len(str(w)) > 6)


def fetched(monitor: Monitor) -> str:
    """The page, which is to be had on 127.0.0.1 alone, and the only one."""
    assert monitor.address is not None
    host, _, port = monitor.address.partition(":")
    assert host == "127.0.0.1"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", int(port)), HANG)
    for wrong in (f"http://{monitor.address}/", urllib.request.Request(f"http://{monitor.address}/metrics", b"x")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(wrong, timeout=HANG)
        refused.value.close()
    with urllib.request.urlopen(f"http://{monitor.address}/metrics", timeout=HANG) as page:
        return str(page.read().decode())


def test_prometheus_text_has_every_figure() -> None:
    metrics = Metrics(lambda: {short_name("a"): Level(3, 4096)})
    for seconds in (0.005, 0.03, 500.0):
        metrics.answered(seconds, 10, 20)
    metrics.made(2, 100, 200)
    metrics.count("failures", "peer")
    lines = exposition(metrics.snapshot()).splitlines()
    assert 'shoal_query_seconds_bucket{le="0.05"} 2' in lines
    assert 'shoal_query_seconds_bucket{le="+Inf"} 3' in lines
    assert "shoal_query_seconds_count 3" in lines
    assert "shoal_queries_total 3" in lines
    assert 'shoal_bytes_total{task="query",direction="sent"} 30' in lines
    assert 'shoal_failures_total{kind="peer"} 1' in lines
    assert f'shoal_pool_items{{client="{short_name("a")}"}} 3' in lines
    assert all(line.startswith(("# HELP shoal_", "# TYPE shoal_", "shoal_")) for line in lines)
    histogram = Histogram()
    histogram.add(0.01)  # a bucket's end belongs to it
    assert histogram.body()["upto"]["0.01"] == 1


@pytest.mark.private
def test_a_certificate_has_so_many_pools(net: Case, certs: dict[str, TLS], tmp_path: Path, spu: None) -> None:
    with in_thread(
        Server(net.folder, "127.0.0.1:0", certs["server"], ServerOptions(pool=tmp_path / "s", max_pools=1))
    ) as server:
        for name in ("a", "a", "b"):
            client = Client(net.folder, server.address, certs["client"], ClientOptions(pool=tmp_path / name))
            with pytest.raises(ShoalError, match="1 pools of this") if name == "b" else contextlib.nullcontext():
                client.open()
            client.close()


# ---------------------------------------------------------------- the end


@contextlib.contextmanager
def server_process(net: Case, certs: dict[str, TLS], folder: Path, grace: float) -> Iterator[subprocess.Popen[str]]:
    ready = folder / "address"
    words = ["--listen", "127.0.0.1:0", "--pool", folder / "s", "--metrics", folder / "m.json", "--ready-file", ready]
    with shoal("serve", net.folder / "server", *words, "--grace", grace, *tls_words(certs["server"])) as process:
        assert eventually(lambda: ready.exists() and ready.read_text().endswith("\n"))
        yield process


def hold_up_messages(patch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """No message goes out before the second event is set; the first tells when one is about to."""
    real, begun, released = SocketWire._both, threading.Event(), threading.Event()

    def held_up(wire: SocketWire, mine: np.ndarray | None, words: int) -> np.ndarray:
        begun.set()
        assert released.wait(HANG)
        return real(wire, mine, words)

    patch.setattr(SocketWire, "_both", held_up)
    return begun, released


@pytest.mark.slow
@pytest.mark.private
@pytest.mark.parametrize(
    "ending", [(30.0, [signal.SIGTERM], True), (60.0, [signal.SIGINT] * 2, False)], ids=["grace", "at once"]
)
def test_a_server_ends_in_order(
    net: Case,
    certs: dict[str, TLS],
    tmp_path: Path,
    spu: None,
    monkeypatch: pytest.MonkeyPatch,
    ending: tuple[float, list[signal.Signals], bool],
) -> None:
    """With grace, an inference that has begun ends well; a second signal cuts it off. Idle sessions are told."""
    grace, signals, answered = ending
    for name in ("busy", "idle"):
        stock(net, tmp_path / name, tmp_path / "s", certs["client"].cert, 1, str(int(name == "idle")) * 16)
    with server_process(net, certs, tmp_path, grace) as process:
        address = (tmp_path / "address").read_text().strip()
        busy, idle = (
            Client(net.folder, address, certs["client"], ClientOptions(pool=tmp_path / n)) for n in ("busy", "idle")
        )
        with busy, idle:
            begun, signalled = hold_up_messages(monkeypatch)
            said: list[object] = []
            thread = threading.Thread(target=lambda: said.append(outcome(busy, net)))
            thread.start()
            assert begun.wait(HANG)
            process.send_signal(signals[0])
            assert idle._queries is not None
            assert first_ready([idle._queries.session.control], HANG)  # the server has heard it: idle sessions are told
            for number in signals[1:]:
                process.send_signal(number)
                process.wait(HANG)
            signalled.set()
            thread.join(HANG)
            assert process.wait(HANG) == 0
            with pytest.raises(ShoalError, match=r"ended by the server|gone"):
                idle.query(net.images[:1].numpy())
            assert len(idle.pool.names()) == 1  # nothing was spent on it
    assert said == [True] if answered else "gone" in str(said[0])
    last = json.loads((tmp_path / "m.json").read_text())
    assert last["queries"] == answered
    assert last["failures"] == ({} if answered else {"stopped": 1})
    assert last["sessions_open"] == 0


def test_a_server_leaves_cores_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 1), (2, 2), (8, 8), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert share_cores() == threads
        assert torch.get_num_threads() == 1  # these would keep the other cores busy
    assert share_cores(3) == 3
    with pytest.raises(ShoalError, match="found 0 threads; need 1 or more"):
        share_cores(0)


def outcome(client: Client, net: Case) -> object:
    try:
        return right(net, client.query(net.images[:1].numpy()).logits)
    except ShoalError as error:
        return error
