"""Framed messages over a socket: the control connection between the parties, and the pipe to a worker process.

A frame consists of two big-endian lengths, a JSON object and raw bytes. The sender may be hostile: both lengths are
checked before anything is read, and nothing but JSON is parsed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import math
import select
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from typing import Any

from shoal.errors import ShoalError
from shoal.private.transport.certs import TLS, fingerprint

HEADER = struct.Struct(">II")
MAX_MESSAGE = 1 << 16
FRAME_SECONDS = 10.0


class ClosedError(ShoalError):
    """The other end closed the connection or died."""


class Channel:
    """One connected socket. `name` names the other end in errors; `max_payload` is the most raw bytes of a frame."""

    def __init__(self, sock: socket.socket, name: str, max_payload: int = 0) -> None:
        self.sock, self.name, self.max_payload = sock, name, max_payload

    def send(self, message: dict[str, Any], payload: bytes = b"") -> None:
        """Write one frame. Raises ClosedError when the other end is gone or does not read it in time."""
        body = json.dumps(message).encode()
        if len(body) > MAX_MESSAGE:
            raise ShoalError(f"found a message of {len(body)} bytes for {self.name}; need at most {MAX_MESSAGE}")
        self.sock.settimeout(FRAME_SECONDS)
        try:
            self.sock.sendall(HEADER.pack(len(body), len(payload)) + body + payload)
        except OSError as error:
            raise ClosedError(f"found {self.name} gone ({error}); need it running; connect again") from error

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Read one frame. Raises ClosedError at the end of the stream, ShoalError for bytes that are not a frame."""
        length, size = HEADER.unpack(self._exactly(HEADER.size))
        if length > MAX_MESSAGE or size > self.max_payload:
            raise ShoalError(f"found a frame of {length} and {size} bytes from {self.name}; need a shoal party there")
        body, payload = self._exactly(length), self._exactly(size)
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ShoalError(f"found no JSON from {self.name}; need a shoal party there") from error
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise ShoalError(f"found a message without a type from {self.name}; need a shoal party there")
        return message, payload

    def _exactly(self, count: int) -> bytes:
        parts, limit = bytearray(), time.monotonic() + FRAME_SECONDS
        while len(parts) < count:
            # One limit for the whole piece: a peer that sends a byte now and then must not block us.
            self.sock.settimeout(max(0.01, limit - time.monotonic()))
            try:
                piece = self.sock.recv(min(count - len(parts), 1 << 20))
            except (OSError, ValueError) as error:
                raise ClosedError(f"found {self.name} silent or gone ({_reason(error)}); need it running") from error
            if not piece:
                raise ClosedError(f"found {self.name} gone; need it running; look at its log and connect again")
            parts += piece
        return bytes(parts)

    def wait(self) -> None:
        """Return when there is something to receive, or the other end is gone."""
        wait_for([self.sock], None)

    def pending(self) -> bool:
        """Whether the TLS layer holds decrypted bytes, which select cannot see."""
        return isinstance(self.sock, ssl.SSLSocket) and self.sock.pending() > 0

    def identity(self) -> str:
        """The fingerprint of the peer's certificate (16 hex digits); ``"plain"`` without TLS."""
        found = self.certificate()
        return "plain" if found is None else fingerprint(found)

    def certificate(self) -> bytes | None:
        """The peer's certificate in DER; None without TLS."""
        return self.sock.getpeercert(True) or b"" if isinstance(self.sock, ssl.SSLSocket) else None

    def close(self) -> None:
        """Close the socket. May be called again."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def first_ready(channels: list[Channel], seconds: float) -> Channel | None:
    """The first of `channels` that can be read or has ended; None if there is none within `seconds`."""
    for channel in channels:
        if channel.pending():
            return channel
    ready = wait_for([c.sock for c in channels], max(0.0, seconds))
    return next((c for c in channels if c.sock in ready), None)


def wait_for(
    reading: list[socket.socket], seconds: float | None, writing: list[socket.socket] | None = None
) -> set[socket.socket]:
    """Those sockets that can be read, or written to, or have ended; empty if none can within `seconds` (None: any).

    Unlike `select.select`, it works with any number of open files. Raises ValueError for a closed socket.
    """
    asked = {sock.fileno(): select.POLLIN for sock in reading}
    for sock in writing or []:
        asked[sock.fileno()] = asked.get(sock.fileno(), 0) | select.POLLOUT
    waiting = select.poll()
    for number, events in asked.items():
        waiting.register(number, events)
    found = {number for number, _ in waiting.poll(None if seconds is None else math.ceil(1000 * seconds))}
    return {sock for sock in (*reading, *(writing or [])) if sock.fileno() in found}


def parse_address(text: object, what: str) -> tuple[str, int]:
    """Host and port of ``"host:port"`` (IPv4 or a name). Raises ShoalError on anything else."""
    host, _, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not host or ":" in host or len(host) > 253 or not digits or int(port) > 65535:
        raise ShoalError(f'found {str(text)[:80]!r} as {what}; need "host:port" with an IPv4 address or a name')
    return host, int(port)


def require_tls(host: str, tls: TLS | None, insecure: bool, server: bool = False) -> None:
    """Raise ShoalError unless there are usable certificates, or plain TCP was asked for on loopback."""
    if tls is not None:
        tls.check()
        _context(tls, server)
        return
    if not (insecure and is_loopback(host)):
        raise ShoalError(
            f"found no TLS for {host}; need certificates of both parties; pass tls=TLS(cert, key, ca) or --cert, "
            "--key and --ca, or insecure=True or --insecure for a trial on loopback (127.0.0.1) only"
        )


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine's loopback, judged by its text alone; no name service is trusted."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(address: str) -> socket.socket:
    """A listening socket on ``"host:port"``; port 0 takes a free one. Raises ShoalError when that is not possible."""
    host, port = parse_address(address, "the server's address")
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # A restarted server can use its port again at once. A second live listener is still refused.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(16)
    except OSError as error:
        sock.close()
        raise ShoalError(
            f"found {address} not free to listen on ({error.strerror or error}); need an unused port of this "
            "machine; stop what holds it or choose another"
        ) from error
    return sock


def admit(
    sock: socket.socket, peer: str, tls: TLS | None, max_payload: int = 0, seconds: float = FRAME_SECONDS
) -> Channel:
    """The channel to an accepted client, whose TLS handshake may take `seconds`.

    Raises ShoalError without a certificate that our authority signed.
    """
    name = f"the client at {peer}"
    try:
        return Channel(_secure(sock, tls, None, seconds), name, max_payload)
    except (OSError, ShoalError) as error:
        sock.close()
        if isinstance(error, ShoalError):
            raise
        raise ShoalError(
            f"found no valid TLS at {name} ({_reason(error)}); need a certificate signed by our authority; "
            "give both parties certificates of one authority"
        ) from error


def connect(address: str, tls: TLS | None, seconds: float, max_payload: int = 0) -> Channel:
    """Connect to a server and check its certificate, trying for `seconds`. Raises ShoalError when that fails."""
    host, port = parse_address(address, "the server's address")
    return _connected(_reach(host, port, seconds), host, tls, f"the server at {address}", max_payload)


def connect_again(control: Channel, tls: TLS | None, seconds: float) -> Channel:
    """Another connection to the server of `control`: same machine, port and host name, also where a name has several
    addresses. Raises ShoalError as `connect` does."""
    ip, port = peer_address(control)
    host = control.sock.server_hostname if isinstance(control.sock, ssl.SSLSocket) else None
    return _connected(_reach(ip, port, seconds), host or ip, tls, control.name, 0)


def peer_address(control: Channel) -> tuple[str, int]:
    """The peer's IP address and port. Raises ShoalError when a server that refuses us has closed already."""
    try:
        ip, port = control.sock.getpeername()[:2]
    except OSError as error:
        raise ShoalError(
            f"found that {control.name} is gone after the TLS handshake; need a certificate signed by its authority"
        ) from error
    return str(ip), int(port)


def _connected(sock: socket.socket, host: str, tls: TLS | None, name: str, max_payload: int) -> Channel:
    try:
        return Channel(_secure(sock, tls, host), name, max_payload)
    except OSError as error:
        sock.close()
        raise ShoalError(
            f"found no valid TLS at {name} ({_reason(error)}); need a certificate for {host} signed by our "
            "authority; give both parties certificates of one authority"
        ) from error


def _reach(host: str, port: int, seconds: float) -> socket.socket:
    limit = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(0.1, limit - time.monotonic()))
        except UnicodeError as error:
            raise ShoalError(f"found {host!r} as a host name; need a valid one; mend the address") from error
        except OSError as error:
            # A server that is just starting refuses connections for a moment, so try again.
            if time.monotonic() + 0.2 >= limit:
                raise ShoalError(
                    f"found no server at {host}:{port} within {seconds:g} s ({_reason(error)}); need one that "
                    "listens there; start it or mend the address"
                ) from error
            time.sleep(0.2)


def _secure(sock: socket.socket, tls: TLS | None, host: str | None, seconds: float = FRAME_SECONDS) -> socket.socket:
    """Wrap `sock` in mutual TLS (as the client of `host`, or as the server) and set it up for control frames."""
    sock.settimeout(seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _keep_alive(sock)
    if tls is None:
        return sock
    context = _context(tls, server=host is None)
    return context.wrap_socket(sock, server_side=host is None, server_hostname=host)


def _context(tls: TLS, server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    with _readable_files(tls):
        context.load_verify_locations(tls.ca)
        context.load_cert_chain(tls.cert, tls.key)
    if server:
        # Session tickets would make the socket readable although no message has arrived.
        context.num_tickets = 0
    return context


@contextlib.contextmanager
def _readable_files(tls: TLS) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ShoalError(
            f"found TLS files that cannot be used at {tls.cert} ({_reason(error)}); need PEM files of one "
            "certificate, its key and its authority; make them again"
        ) from error


def _keep_alive(sock: socket.socket) -> None:
    # A machine that fails does not close its connections. Probes notice that within about 12 s.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 6), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _reason(error: Exception) -> str:
    return str(getattr(error, "verify_message", "") or getattr(error, "reason", "") or error)
