"""Server and Client: two processes over mutual TLS on loopback, right logits, and every way to fail."""

from __future__ import annotations

import contextlib
import importlib
import json
import socket
import struct
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.errors import ShoalError
from shoal.private.program.artifact import save_artifact
from shoal.private.program.clear import run_clear
from shoal.private.serving.client import ON_DEMAND, Client
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.prepared import Offline, Request
from shoal.private.serving.server import Server
from shoal.private.serving.session import Session
from shoal.private.transport.certs import TLS, make_certificates
from shoal.private.transport.channel import parse_address
from tests.support.dealing import deal, stock
from tests.support.forked import forked, heard, serving
from tests.support.parties import SHAPE, Case, Small, case, small_mask
from tests.support.processes import children, gone, in_thread
from tests.support.waiting import eventually

UNITS = 6
"""Each truncation may be one unit off; the little networks here have few, damped by the layers after them."""


def client_of(artifact: Path, address: str, tls: TLS | None, pool: Path, **more: Any) -> Client:
    return Client(artifact, address, tls, ClientOptions(pool=pool, **more))


# ---------------------------------------------------------------- answers


@pytest.mark.private
def test_queries_of_several_images_give_the_networks_logits(
    small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None
) -> None:
    stock(small, tmp_path / "c", tmp_path / "s", certs["client"].cert, 6)
    server = Server(small.folder, "127.0.0.1:0", certs["server"], ServerOptions(pool=tmp_path / "s"))
    with (
        in_thread(server),
        client_of(small.folder / "client", server.address, certs["client"], tmp_path / "c") as client,
    ):
        assert client.setup_s > 0
        results = [client.query(small.images[:n].numpy()) for n in (1, 1, 3)]
        for bad in (np.zeros((1, 1, 9, 8), np.float32), np.zeros((0, *SHAPE), np.float32)):
            with pytest.raises(ShoalError, match="images of shape"):
                client.query(bad)
        with pytest.raises(ShoalError, match="NaN"):
            client.query(np.full((1, *SHAPE), np.nan, np.float32))
        results.append(client.query(small.images[:1].numpy()))  # the session outlives a user's mistake
    for result in results:
        assert result.logits.dtype == np.float64
        assert np.abs(result.logits - small.truth(len(result.logits))).max() <= UNITS * small.unit + 1e-6
        assert 0 < result.relu_s + result.linear_s < result.seconds
        assert result.memory_bytes > 1 << 20
    with pytest.raises(ShoalError, match="no open session"):
        client.query(small.images[:1].numpy())


def test_that_comparison_would_notice_a_misplaced_mask(small: Case) -> None:
    wrong = replace(
        small.program, keep={"relu": np.flatnonzero(small_mask().permute(1, 2, 0).numpy()).astype(np.int32)}
    )
    right = run_clear(small.program, small.weights, small.images[:3])[-1]
    assert np.abs(run_clear(wrong, small.weights, small.images[:3])[-1] - right).max() > 100 * UNITS * small.unit


# ---------------------------------------------------------------- items made when a query needs them


@pytest.mark.private
def test_a_query_makes_what_its_images_lack_a_few_at_a_time(
    small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None, caplog: pytest.LogCaptureFixture
) -> None:
    where = stock(small, tmp_path / "c", tmp_path / "s", certs["client"].cert, 1)
    server = Server(small.folder, "127.0.0.1:0", certs["server"], ServerOptions(pool=tmp_path / "s"))
    asked: list[int] = []

    def dealt(local: object, request: Request) -> Offline:
        """Items of a dealer, in place of those of two SPU processes."""
        assert client._queries is None  # a session that waits for long would be ended by the server
        asked.append(request.count)
        deal(small, where, request.count)
        return Offline([(request.count, {})])

    with in_thread(server), client_of(small.folder, server.address, certs["client"], tmp_path / "c") as client:
        client._prepare = dealt  # type: ignore[method-assign]
        many = small.images[: ON_DEMAND + 3]
        result = client.query(many.numpy())
        assert asked == [ON_DEMAND, 2]
        assert result.made == ON_DEMAND + 2
        assert result.making_s > 0
        assert client.ready == 0
        assert np.abs(result.logits - small.truth(len(many))).max() <= UNITS * small.unit + 1e-6
    assert f"no item is ready; making {ON_DEMAND} now" in caplog.messages[0]


@pytest.mark.slow
@pytest.mark.private
def test_a_query_that_makes_items_ends_when_the_server_is_killed(
    small: Case, certs: dict[str, TLS], spu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, workers = Session.from_worker, list[int]()
    with (
        serving(small.folder, certs["server"]) as (process, address),
        client_of(small.folder, address, certs["client"], tmp_path) as client,
    ):

        def killing(session: Session, seconds: float) -> object:
            if not workers:  # at the first message: the SPU processes are starting
                assert eventually(lambda: children(process.pid or 0))
                workers.extend(children(process.pid or 0))
                process.kill()
            return real(session, seconds)

        monkeypatch.setattr(Session, "from_worker", killing)
        with pytest.raises(ShoalError, match=r"gone|reset|closed|SPU") as caught:
            client.query(small.images[:1].numpy())
        assert "in time" not in str(caught.value)  # no limit was reached
        assert all(gone(pid) for pid in workers)
        with pytest.raises(ShoalError, match="no open session"):
            client.query(small.images[:1].numpy())


# ---------------------------------------------------------------- refusals before any SPU link

SILENT = "no answer"


def refused(client: Client, match: str) -> None:
    with contextlib.closing(client), pytest.raises(ShoalError, match=match) as caught:
        client.open()
    assert "need" in str(caught.value)
    assert "in time" not in str(caught.value) or match == SILENT


@pytest.mark.private
def test_certificates_of_another_authority_are_refused(
    small: Case, certs: dict[str, TLS], tmp_path: Path, spu: None
) -> None:
    other = make_certificates(tmp_path)
    mixed = TLS(other["client"].cert, other["client"].key, certs["client"].ca)
    with in_thread(Server(small.folder, "127.0.0.1:0", certs["server"])) as server:
        refused(client_of(small.folder, server.address, other["client"], tmp_path), "no valid TLS at the server")
        refused(client_of(small.folder, server.address, mixed, tmp_path), r"TLS|gone|silent")
        assert any("no valid TLS at the client" in e for e in server.errors)


@pytest.mark.private
def test_a_certificate_for_another_name_is_refused(small: Case, tmp_path: Path, spu: None) -> None:
    elsewhere = make_certificates(tmp_path, ("example.org", "10.0.0.1"))
    with in_thread(Server(small.folder, "127.0.0.1:0", elsewhere["server"])) as server:
        refused(client_of(small.folder, server.address, elsewhere["client"], tmp_path), "certificate for 127.0.0.1")


@pytest.mark.private
def test_plain_tcp_is_for_loopback_and_on_request(small: Case, tmp_path: Path, spu: None) -> None:
    for address, insecure in (("127.0.0.1:0", False), ("0.0.0.0:0", True), ("example.org:9", True)):
        with pytest.raises(ShoalError, match="no TLS"):
            Server(small.folder, address, None, ServerOptions(insecure=insecure))
        with pytest.raises(ShoalError, match="no TLS"):
            client_of(small.folder, address, None, tmp_path, insecure=insecure)


@pytest.mark.private
def test_an_artifact_of_another_network_or_setting_is_refused(small: Case, tmp_path: Path, spu: None) -> None:
    torch.manual_seed(9)
    other = case(Small(), tmp_path / "other", {})
    save_artifact(tmp_path / "ferret", small.program, small.weights, ot_kind="YACL_Ferret")
    with in_thread(Server(small.folder, "127.0.0.1:0", None, ServerOptions(insecure=True))) as server:
        refused(client_of(other.folder, server.address, None, tmp_path, insecure=True), "digest .* at the client")
        refused(
            client_of(tmp_path / "ferret", server.address, None, tmp_path, insecure=True),
            "ot_kind YACL_Ferret",
        )
        stranger = client_of(small.folder, server.address, None, tmp_path, insecure=True)
        stranger.local.terms["spu"] = "0.9.4"
        refused(stranger, "spu 0.9.4 at the client and .*install the same SPU")
        old = client_of(small.folder, server.address, None, tmp_path, insecure=True)
        old.local.terms["artifact"] = "shoal-artifact-0"
        refused(old, "artifact shoal-artifact-0")


@pytest.mark.private
def test_a_busy_port_and_an_absent_server(small: Case, tmp_path: Path, spu: None) -> None:
    with Server(small.folder, "127.0.0.1:0", None, ServerOptions(insecure=True)) as server:
        with pytest.raises(ShoalError, match="not free to listen"):
            Server(small.folder, server.address, None, ServerOptions(insecure=True))
        port = server.address
    refused(client_of(small.folder, port, None, tmp_path, insecure=True, connect_s=1.0), "no server at")


@pytest.mark.private
def test_a_server_that_never_answers(small: Case, tmp_path: Path, spu: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        refused(client_of(small.folder, address, None, tmp_path, insecure=True, connect_s=1.0), SILENT)


@pytest.mark.private
def test_hostile_bytes_end_their_own_connection_only(small: Case, spu: None) -> None:
    with in_thread(Server(small.folder, "127.0.0.1:0", None, ServerOptions(insecure=True))) as server:
        for data in (b"GET / HTTP/1.1\r\n\r\n", struct.pack(">II", 2, 0) + b"[]", hello({"link": 3}), hello({})):
            # The server may have hung up before we are done.
            with socket.create_connection(parse_address(server.address, "it")) as sock, contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
        assert len(server.errors) == 4


def hello(body: dict[str, object]) -> bytes:
    text = json.dumps({"type": "hello", **body}).encode()
    return struct.pack(">II", len(text), 0) + text


def test_without_spu_the_error_says_what_to_install(small: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for make, options in ((Server, ServerOptions(insecure=True)), (Client, ClientOptions(insecure=True))):
        with pytest.raises(ShoalError, match=r"3\.10 or 3\.11.*pip install shoal\[private\]"):
            make(small.folder, "127.0.0.1:0", None, options)


def import_anew(pipe: Connection) -> None:
    """Import the parties, then the engine, as if nobody had; say why the engine cannot be had."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "shoal"]:
        del sys.modules[name]
    sys.modules["spu"] = None  # type: ignore[assignment]
    importlib.import_module("shoal.private.serving.client")
    try:
        importlib.import_module("shoal.private.engine.spu")
    except Exception as error:
        pipe.send(f"{type(error).__name__} {error}")


def test_the_parties_import_without_spu_and_the_engine_says_why_not() -> None:
    with forked(import_anew) as (_, pipe):
        said = heard(pipe)
    assert said.startswith("ShoalError")
    assert "pip install shoal[private]" in said
