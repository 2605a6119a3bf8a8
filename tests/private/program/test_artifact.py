"""Artifacts on disk, certificates, and frames on the control connection."""

from __future__ import annotations

import contextlib
import json
import socket
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ShoalError
from shoal.private.program.artifact import load_artifact, save_artifact
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import Channel, ClosedError, parse_address
from tests.support.parties import Case


def test_the_clients_half_holds_no_weight(small: Case) -> None:
    client, server = small.folder / "client", small.folder / "server"
    files = sorted(p.name for p in client.rglob("*"))
    assert files == ["keep.safetensors", "manifest.json", "program.json"]
    assert (server / "weights.safetensors").exists()
    held = b"".join(p.read_bytes() for p in client.iterdir())
    for array in small.weights.arrays.values():
        floats = array.astype(np.float64) * small.unit
        for form in (array, array.astype(np.int32), floats, floats.astype(np.float32)):
            data = form.tobytes()
            pieces = [data[i : i + 8] for i in range(0, len(data) - 7, 8)]
            # Eight zero bytes are no secret, and are found anywhere.
            assert not any(piece in held for piece in pieces if piece.strip(b"\0") and piece.strip(b"\xff"))


def test_artifacts_of_another_version_or_altered_are_refused(small: Case, tmp_path: Path) -> None:
    for change, match in (({"artifact": "shoal-artifact-0"}, "artifact version"), ({"digest": "0"}, "does not fit")):
        save_artifact(tmp_path, small.program, small.weights)
        path = tmp_path / "client" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ShoalError, match=match):
            load_artifact(tmp_path, "client")
        path.write_text("[")
        with pytest.raises(ShoalError, match="JSON"):
            load_artifact(tmp_path, "client")
    with pytest.raises(ShoalError, match="ot_kind"):
        save_artifact(tmp_path, small.program, small.weights, ot_kind="EMP")


# ---------------------------------------------------------------- certificates and frames


def test_certificates_are_private_and_the_authority_cannot_sign_again(certs: dict[str, TLS]) -> None:
    folder = certs["server"].ca.parent
    assert sorted(p.name for p in folder.iterdir()) == [
        "ca.pem",
        "client.key",
        "client.pem",
        "server.key",
        "server.pem",
    ]
    for tls in certs.values():
        assert stat.S_IMODE(tls.key.stat().st_mode) == 0o600
    with pytest.raises(ShoalError, match="no readable TLS key"):
        replace(certs["server"], key=folder / "absent").check()


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    a, b = socket.socketpair()
    yield Channel(a, "a", 100), Channel(b, "b", 100)
    a.close()
    b.close()


def test_frames_carry_messages_and_bytes(pair: tuple[Channel, Channel]) -> None:
    pair[0].send({"type": "x", "n": 1}, b"abc")
    assert pair[1].receive() == ({"type": "x", "n": 1}, b"abc")
    with pytest.raises(ShoalError, match="at most"):
        pair[0].send({"type": "x" * 70_000})
    pair[0].close()
    with pytest.raises(ClosedError):
        pair[1].receive()


@settings(max_examples=60)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_shoal_error(data: bytes) -> None:
    a, b = socket.socketpair()
    with a, b:
        a.sendall(data)
        a.shutdown(socket.SHUT_WR)
        try:
            message, payload = Channel(b, "b", 10).receive()
        except ShoalError:
            return
        assert isinstance(message["type"], str)
        assert len(payload) <= 10


@settings(max_examples=40)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s), max_leaves=5))
def test_addresses_are_text_or_an_error(value: object) -> None:
    with contextlib.suppress(ShoalError):
        host, port = parse_address(value, "it")
        assert host
        assert 0 <= port <= 65535
