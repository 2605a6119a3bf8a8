"""The two parties: a `Server` that owns weights and a `Client` that owns images, and the session between them.

A control connection (JSON frames over mutual TLS) compares versions, program and configuration before SPU connects,
agrees on each query, and tells either side at once when the other is gone.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from shoal.errors import ShoalError
from shoal.private.artifact import difference, load_half, save_artifact
from shoal.private.certs import TLS
from shoal.private.channel import Channel, ClosedError, check_secure, context, free_port, split
from shoal.private.session import Worker

__all__ = ["TLS", "Client", "Result", "Server", "save_artifact"]

SERVER, CLIENT = 0, 1
MAX_BATCH = 4096


@dataclass(frozen=True)
class Result:
    """One private inference as the client sees it.

    `logits` [N, classes] float64 are the strongest classifier's, `exits` those of all, weak to strong. Bytes and
    messages are those of SPU's link in both directions, without TLS and TCP framing; seconds are wall time.
    """

    logits: np.ndarray
    exits: tuple[np.ndarray, ...]
    seconds: float
    relu_s: float
    linear_s: float
    bytes: int
    messages: int
    peak_bytes: int
    mode: str = "direct"


class _Session:
    """A worker and a control connection that live and die together."""

    def __init__(self, sock: socket.socket, channel: Channel, worker: Worker, timeout_s: float) -> None:
        self.sock, self.channel, self.worker, self.timeout_s = sock, channel, worker, timeout_s
        self.peer_done = False

    def from_worker(self, kind: str) -> tuple[dict[str, Any], bytes]:
        """The worker's next message; raises as soon as the peer closes or complains, or time runs out."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ClosedError(f"found no result within {self.timeout_s:g} s; need a live peer; raise the timeout")
            watched: list[Any] = [self.worker.fd] if self.peer_done else [self.worker.fd, self.sock]
            ready, _, _ = select.select(watched, [], [], left)
            if self.worker.fd in ready:
                _, body, payload = self.worker.channel.receive(kind)
                return body, payload
            if ready:
                self.channel.receive("done")  # raises at the end of the stream and on an error
                self.peer_done = True

    def meet(self) -> None:
        """Wait until the server's worker, too, is done with what ours has finished."""
        if not self.peer_done:
            self.channel.receive("done")
        self.peer_done = False

    def next_frame(self) -> tuple[str, dict[str, Any], bytes]:
        """The peer's next message, however long it takes, unless the worker dies first."""
        if not _pending(self.sock):
            both: list[Any] = [self.worker.fd, self.sock]
            ready, _, _ = select.select(both, [], [])
            if self.worker.fd in ready:
                self.worker.channel.receive("none")  # raises what the worker said last
        return self.channel.receive("query", "bye")


def _pending(sock: socket.socket) -> bool:
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0


class Server:
    """Holds `artifact` (a `server/` half) and answers clients, one session at a time, at `address` (host:port).

    Raises ShoalError for a bad artifact, bad TLS files, plain TCP off loopback, and a port in use.
    """

    def __init__(
        self,
        artifact: Path | str,
        address: str,
        tls: TLS | None,
        *,
        timeout_s: float = 120.0,
        insecure: bool = False,
    ) -> None:
        self.artifact, self.tls, self.timeout_s = Path(artifact), tls, timeout_s
        self.program, self.manifest = load_half(artifact)
        if not (self.artifact / "weights.safetensors").exists():
            raise ShoalError(f"found no weights at {artifact}; need the server/ half of an artifact")
        self.host, port = split(address)
        check_secure(self.host, tls, insecure)
        self.context = context(tls, server=True) if tls else None
        self.listener = _listen(self.host, port)
        self.address = f"{self.host}:{self.listener.getsockname()[1]}"
        self.closed = False

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take no further session; one that runs is cut off."""
        self.closed = True
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def serve(self, max_sessions: int | None = None, log: Any = None) -> None:
        """Answer sessions until `stop`, or until `max_sessions` have begun. A failed one does not end the server."""
        count = 0
        while not self.closed and (max_sessions is None or count < max_sessions):
            try:
                raw, peer = self.listener.accept()
            except OSError:
                return
            try:
                count += self._session(raw, f"the client at {peer[0]}")
            except ShoalError as error:
                count += 1
                if log is not None:
                    log(str(error))

    def _session(self, raw: socket.socket, peer: str) -> bool:
        """One session; False when the connection was refused before it became one."""
        raw.settimeout(min(self.timeout_s, 30.0))
        try:
            sock = self.context.wrap_socket(raw, server_side=True) if self.context else raw
        except (ssl.SSLError, OSError):
            raw.close()
            return False
        with sock:
            channel = Channel.of_socket(sock, peer)
            hello = self._greet(channel)
            if hello is None:
                return False
            return self._work(sock, channel, hello)

    def _greet(self, channel: Channel) -> dict[str, Any] | None:
        try:
            _, hello, _ = channel.receive("hello")
        except ShoalError:
            return None
        text = difference(self.manifest, hello.get("manifest") or {})
        host = hello.get("link")
        if text is None and not (isinstance(host, str) and host.count(":")):
            text = f"found link address {str(host)[:80]!r}; need host:port"
        if text is not None:
            with suppress(ClosedError):
                channel.send("error", {"message": text})
            return None
        return hello

    def _work(self, sock: socket.socket, channel: Channel, hello: dict[str, Any]) -> bool:
        link = f"{self.host}:{free_port(self.host)}"
        options = {"timeout_s": self.timeout_s}
        worker = Worker(self.artifact, SERVER, (link, hello["link"]), self.tls, options)
        session = _Session(sock, channel, worker, self.timeout_s)
        try:
            channel.send("welcome", {"link": link})
            session.from_worker("ready")
            channel.send("done")
            self._answer(session)
        except ShoalError as error:
            with suppress(ClosedError):
                channel.send("error", {"message": f"the server says: {error}"})
            raise
        finally:
            worker.kill()
        return True

    def _answer(self, session: _Session) -> None:
        while True:
            session.sock.settimeout(self.timeout_s)
            kind, body, _ = session.next_frame()
            if kind == "bye":
                return
            batch = body.get("batch")
            if type(batch) is not int or not 1 <= batch <= MAX_BATCH:
                raise ShoalError(f"found a batch of {str(batch)[:20]}; need 1 to {MAX_BATCH} images")
            session.channel.send("go", {"batch": batch})
            session.worker.channel.send("run", {"batch": batch})
            session.from_worker("done")
            session.channel.send("done")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(8)
    except OSError as error:
        listener.close()
        raise ShoalError(f"found that {host}:{port} cannot be used ({error.strerror}); need a free port") from error
    return listener


class Client:
    """Asks the server at `address` to classify images that it never sees; `artifact` is a `client/` half.

    Loads no weights and receives none. SPU's link needs both parties to listen: `link_address` (host:port) is where
    the server reaches this client, by default the address that this host connects from and a free port.
    Raises ShoalError for everything that keeps a session from starting.
    """

    def __init__(
        self,
        artifact: Path | str,
        address: str,
        tls: TLS | None,
        *,
        timeout_s: float = 120.0,
        insecure: bool = False,
        link_address: str | None = None,
    ) -> None:
        begun = time.perf_counter()
        self.program, self.manifest = load_half(artifact)
        self.timeout_s = timeout_s
        host, port = split(address)
        check_secure(host, tls, insecure)
        self.sock = _reach(host, port, tls, timeout_s)
        self.channel = Channel.of_socket(self.sock, f"the server at {address}")
        local = self.sock.getsockname()[0]
        mine = link_address or f"{local}:{free_port(local)}"
        self.worker: Worker | None = None
        try:
            self._shake(Path(artifact), mine, tls)
        except BaseException:
            self.close()
            raise
        self.setup_s = time.perf_counter() - begun

    def _shake(self, artifact: Path, mine: str, tls: TLS | None) -> None:
        self.channel.send("hello", {"manifest": self.manifest, "link": mine})
        _, welcome, _ = self.channel.receive("welcome")
        split(str(welcome.get("link")))
        self.worker = Worker(artifact, CLIENT, (welcome["link"], mine), tls, {"timeout_s": self.timeout_s})
        self.session = _Session(self.sock, self.channel, self.worker, self.timeout_s)
        self.session.from_worker("ready")
        self.session.meet()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session on both sides."""
        if self.worker is not None:
            with suppress(ShoalError):
                self.channel.send("bye")
            self.worker.kill()
            self.worker = None
        self.sock.close()

    def query(self, images: np.ndarray) -> Result:
        """Classify preprocessed float32 `images` [N, C, H, W].

        Raises ShoalError for images of another shape or without a finite value, and when the server is gone; the
        session is over then.
        """
        x = self._checked(images)
        if self.worker is None:
            raise ShoalError("found a closed session; need an open one; make a new Client")
        begun = time.perf_counter()
        try:
            self.channel.send("query", {"batch": len(x)})
            self.channel.receive("go")
            self.worker.channel.send("run", {"batch": len(x)}, x.tobytes())
            body, payload = self.session.from_worker("done")
            self.session.meet()
        except ShoalError:
            self.close()
            raise
        return _result(body, payload, time.perf_counter() - begun)

    def _checked(self, images: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(images, dtype="<f4")
        if x.ndim != 4 or x.shape[1:] != tuple(self.program.input_shape) or not 1 <= len(x) <= MAX_BATCH:
            raise ShoalError(
                f"found images of shape {x.shape}; need [N, {', '.join(map(str, self.program.input_shape))}] with "
                f"N from 1 to {MAX_BATCH}; resize them"
            )
        if not np.isfinite(x).all():
            raise ShoalError("found NaN or infinity in the images; need finite pixels")
        limit = 4 * max(self.program.ranges.get(self.program.input, np.inf), 1.0)
        if np.abs(x).max() > limit:
            raise ShoalError(f"found a pixel of {np.abs(x).max():.3g}; need at most {limit:.3g}; preprocess the images")
        return x


def _reach(host: str, port: int, tls: TLS | None, timeout_s: float) -> socket.socket:
    made = context(tls, server=False) if tls else None
    try:
        raw = socket.create_connection((host, port), timeout=min(timeout_s, 30.0))
    except OSError as error:
        raise ShoalError(f"found no server at {host}:{port} ({error}); need shoal serve running there") from error
    try:
        sock = made.wrap_socket(raw, server_hostname=host) if made else raw
    except (ssl.SSLError, OSError) as error:
        raw.close()
        raise ShoalError(
            f"found a server at {host}:{port} whose certificate does not fit ({error}); need one "
            "signed by --ca for that host name"
        ) from error
    sock.settimeout(timeout_s)
    return sock


def _result(body: dict[str, Any], payload: bytes, seconds: float) -> Result:
    flat, exits = np.frombuffer(payload, "<f8"), []
    for shape in body["shapes"]:
        size = int(np.prod(shape))
        exits.append(flat[:size].reshape(shape))
        flat = flat[size:]
    figures = {k: body[k] for k in ("relu_s", "linear_s", "bytes", "messages", "peak_bytes")}
    return Result(exits[-1], tuple(exits), seconds, **figures)
