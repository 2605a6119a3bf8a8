"""Framed messages between the parties (over TLS) and between a party and its worker (over pipes).

A frame is the length of a JSON header (4 bytes, big-endian), the header, and as many raw bytes as the header says.
Nothing is unpickled; sizes are checked before anything is read.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any

from shoal.errors import ShoalError
from shoal.private.certs import TLS

HEADER_LIMIT = 64 << 10
PAYLOAD_LIMIT = 1 << 30


class ClosedError(ShoalError):
    """The other end is gone."""


class Channel:
    """Send and receive frames through `read(n)` (up to n bytes, none at the end) and `write(data)`."""

    def __init__(
        self, read: Callable[[int], bytes], write: Callable[[bytes], Any], peer: str, payload_limit: int = 0
    ) -> None:
        self._read, self._write, self.peer, self.payload_limit = read, write, peer, payload_limit

    @classmethod
    def of_pipe(cls, read_fd: int, write_fd: int, peer: str) -> Channel:
        """A channel over two pipe ends."""

        def write(data: bytes) -> None:
            view = memoryview(data)
            while view:
                view = view[os.write(write_fd, view) :]

        return cls(lambda n: os.read(read_fd, n), write, peer, PAYLOAD_LIMIT)

    @classmethod
    def of_socket(cls, sock: socket.socket, peer: str) -> Channel:
        """A channel over a connected socket; the other party may send headers but no payload."""
        return cls(sock.recv, sock.sendall, peer)

    def send(self, kind: str, body: dict[str, Any] | None = None, payload: bytes = b"") -> None:
        """Send one frame. Raises ClosedError when the other end is gone."""
        header = json.dumps({"kind": kind, "body": body or {}, "bytes": len(payload)}).encode()
        try:
            self._write(struct.pack(">I", len(header)) + header + payload)
        except OSError as error:
            raise ClosedError(f"found that {self.peer} is gone ({error}); need it up; start it again") from error

    def receive(self, *kinds: str) -> tuple[str, dict[str, Any], bytes]:
        """The next frame: (kind, body, payload). An ``error`` frame is raised as the sentence that it carries.

        Raises ClosedError at the end of the stream or after the socket's timeout, ShoalError on a frame that is
        malformed, too large, or of a kind other than `kinds`.
        """
        (size,) = struct.unpack(">I", self._exactly(4))
        if size > HEADER_LIMIT:
            raise self._malformed(f"a header of {size} bytes")
        kind, body, length = self._header(self._exactly(size))
        if not 0 <= length <= self.payload_limit:
            raise self._malformed(f"a payload of {length} bytes")
        payload = self._exactly(length)
        if kind == "error":
            raise ShoalError(str(body.get("message", "the peer reported an error"))[:2000])
        if kinds and kind not in kinds:
            raise self._malformed(f"a message {kind[:40]!r}")
        return kind, body, payload

    def _header(self, data: bytes) -> tuple[str, dict[str, Any], int]:
        try:
            header = json.loads(data)
            kind, body, length = header["kind"], header["body"], header["bytes"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._malformed("no JSON header") from error
        if not (isinstance(kind, str) and isinstance(body, dict) and type(length) is int):
            raise self._malformed("a header of other types")
        return kind, body, length

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self._read(min(count - len(parts), 1 << 20))
            except TimeoutError as error:
                raise ClosedError(f"found {self.peer} silent; need an answer in time; raise the timeout") from error
            except OSError as error:
                raise ClosedError(f"found that {self.peer} is gone ({error}); need it up; start it again") from error
            if not part:
                raise ClosedError(f"found that {self.peer} closed the connection; need it up; start it again")
            parts += part
        return bytes(parts)

    def _malformed(self, what: str) -> ShoalError:
        return ShoalError(f"found {what} from {self.peer}; need a message of this version of shoal")


def context(tls: TLS, server: bool) -> ssl.SSLContext:
    """A TLS 1.3 context that shows this party's certificate and demands the peer's. Raises ShoalError on bad files."""
    tls.check()
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        made.load_cert_chain(tls.cert, tls.key)
        made.load_verify_locations(tls.ca)
    except (ssl.SSLError, OSError) as error:
        raise ShoalError(f"found unusable TLS files ({error}); need a certificate, its key and an authority") from error
    made.verify_mode = ssl.CERT_REQUIRED
    return made


def split(address: str) -> tuple[str, int]:
    """(host, port) of ``host:port``. Raises ShoalError otherwise."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ShoalError(f"found address {address!r}; need host:port, such as 127.0.0.1:7766")
    return host.strip("[]"), int(port)


def check_secure(host: str, tls: TLS | None, insecure: bool) -> None:
    """Plain TCP is allowed only on loopback, and only when asked for. Raises ShoalError otherwise."""
    if tls is not None:
        return
    if not insecure:
        raise ShoalError("found no TLS files; need --cert, --key and --ca (see shoal certs), or --insecure on loopback")
    if host not in ("localhost", "::1") and not host.startswith("127."):
        raise ShoalError(f"found plain TCP to {host}; need TLS off loopback; pass --cert, --key and --ca")


def free_port(host: str) -> int:
    """A port that is free now on `host`."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
