"""Connections between the parties: TLS 1.3 with both certificates or loopback, and frames of limited size."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest

from shoal.errors import ShoalError
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import (
    HEADER,
    MAX_MESSAGE,
    Channel,
    admit,
    connect,
    is_loopback,
    parse_address,
    require_tls,
)
from tests.support.waiting import HANG


@contextlib.contextmanager
def admitting(tls: TLS) -> Iterator[tuple[tuple[str, int], list[str]]]:
    """A server that admits one client; its address, and afterwards what became of it."""
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def work() -> None:
            sock, peer = listener.accept()
            try:
                admit(sock, peer[0], tls).close()
                said.append("admitted")
            except ShoalError as error:
                said.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        yield listener.getsockname(), said
        thread.join(HANG)


def context(tls: TLS, own: bool, version: ssl.TLSVersion) -> ssl.SSLContext:
    """A client's context that checks the server: with or without its own certificate, up to a version of TLS."""
    made = ssl.create_default_context(cafile=str(tls.ca))
    made.maximum_version = version
    if own:
        made.load_cert_chain(tls.cert, tls.key)
    return made


@pytest.mark.parametrize(
    ("own", "version", "said"),
    [
        (True, ssl.TLSVersion.TLSv1_3, "admitted"),
        (True, ssl.TLSVersion.TLSv1_2, "no valid TLS at the client"),
        (False, ssl.TLSVersion.TLSv1_3, "no valid TLS at the client"),
    ],
)
def test_a_server_admits_tls_1_3_with_a_certificate(
    certs: dict[str, TLS], own: bool, version: ssl.TLSVersion, said: str
) -> None:
    made, refused = context(certs["client"], own, version), contextlib.suppress(OSError)  # or at this end
    with admitting(certs["server"]) as (address, outcome), socket.create_connection(address) as sock, refused:
        made.wrap_socket(sock, server_hostname="127.0.0.1").close()
    assert len(outcome) == 1
    assert said in outcome[0]


def test_a_client_refuses_a_server_with_an_older_tls(certs: dict[str, TLS]) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.load_cert_chain(certs["server"].cert, certs["server"].key)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def work() -> None:
            sock, _ = listener.accept()
            with contextlib.suppress(OSError), old.wrap_socket(sock, server_side=True):
                pass
            sock.close()

        thread = threading.Thread(target=work)
        thread.start()
        with pytest.raises(ShoalError, match="no valid TLS at the server"):
            connect(f"127.0.0.1:{listener.getsockname()[1]}", certs["client"], HANG)
        thread.join(HANG)


@pytest.mark.parametrize("host", ["10.0.0.1", "0.0.0.0", "example.org", "127.0.0.1.example.org", ""])
def test_without_tls_only_loopback_is_allowed(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ShoalError, match="found no TLS for"):
        require_tls(host, None, insecure=True)
    for near in ("127.0.0.1", "localhost"):
        require_tls(near, None, insecure=True)
        with pytest.raises(ShoalError, match="found no TLS for"):
            require_tls(near, None, insecure=False)


@pytest.mark.parametrize(("length", "size"), [(MAX_MESSAGE + 1, 0), (2, 9), (2, (1 << 32) - 1), (1 << 31, 1 << 31)])
def test_a_frame_beyond_its_limits_is_refused_by_its_header_alone(length: int, size: int) -> None:
    mine, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(HEADER.pack(length, size))
        channel = Channel(mine, "the peer", 8)
        with pytest.raises(ShoalError, match=f"found a frame of {length} and {size} bytes from the peer"):
            channel.receive()  # without a byte of the frame itself
        channel.close()


def test_an_address_is_a_host_and_a_port() -> None:
    assert parse_address("localhost:7766", "it") == ("localhost", 7766)
    for wrong in ("a\x1b[31m:x", ":80", "::1:80", 3, None):
        with pytest.raises(ShoalError, match="as it; need") as caught:
            parse_address(wrong, "it")
        assert str(caught.value).isprintable()
