"""The two parties: a `Server` that owns the weights and a `Client` that owns the images and alone sees logits.

The control connection (mutual TLS) compares what must agree before SPU links anything, starts queries and tells
each party at once when the other is gone. SPU runs over a second, direct connection, in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from shoal.errors import ShoalError
from shoal.private.artifact import Artifact, load_artifact
from shoal.private.certs import TLS
from shoal.private.channel import (
    Channel,
    accept,
    connect,
    first_ready,
    free_port,
    is_loopback,
    listen,
    parse_address,
    require_tls,
)
from shoal.private.fixed import FixedPoint
from shoal.private.line import POLL_SECONDS, Line, compare, whole
from shoal.private.program import Weights

__all__ = ["TLS", "Client", "Result", "Server"]

SERVER, CLIENT = 0, 1
SETUP_SECONDS = 300.0


@dataclass(frozen=True)
class Result:
    """What one query gave: logits [N, classes] of the last exit, all `exits` weak to strong, and its cost.

    `seconds` is the whole query as the client waits for it; `relu_s` and `linear_s` are the parts inside SPU.
    `bytes` and `messages` count both directions of SPU's link, without framing and TLS. `memory_bytes` is the
    peak of the client's SPU process so far.
    """

    logits: np.ndarray
    exits: tuple[np.ndarray, ...]
    seconds: float
    bytes: int
    messages: int
    relu_s: float
    linear_s: float
    memory_bytes: int
    mode: str = "direct"


class Server:
    """Serves one artifact at ``"host:port"`` (port 0 takes a free one), one session at a time.

    `artifact_dir` is the artifact or its `server` half. `tls` is this party's certificate, key and authority;
    every client with a certificate of that authority may query. `tls=None` needs `insecure=True` and a loopback
    host. `timeout_s` limits the wait for the peer within a query and between queries. `link_port` fixes the port
    of SPU's own connection (a free one otherwise). `shared_weights` secret-shares the weights with the client
    instead of keeping them: twice the work, for comparison only. Raises ShoalError, at once, for a wrong
    artifact, missing TLS, a port in use, and where SPU is not installed.
    """

    def __init__(
        self,
        artifact_dir: Path | str,
        address: str,
        tls: TLS | None,
        *,
        insecure: bool = False,
        timeout_s: float = 600.0,
        max_batch: int = 128,
        link_port: int | None = None,
        shared_weights: bool = False,
        threads: int | None = None,
    ) -> None:
        versions = _require_spu()
        host, _ = parse_address(address, "the server's address")
        require_tls(host, tls, insecure)
        self.artifact = load_artifact(artifact_dir, "server")
        Weights.load(self.artifact.folder).check(self.artifact.program)
        self.terms = self.artifact.terms | versions
        self.tls, self.timeout_s, self.max_batch, self.link_port = tls, timeout_s, max_batch, link_port
        self.shared_weights, self.threads = shared_weights, _threads(threads)
        self.log = logging.getLogger("shoal.private.server")
        self.errors: list[str] = []
        self._stopped = threading.Event()
        self._listener = listen(address)
        self.address = f"{host}:{self._listener.getsockname()[1]}"

    def serve(self, max_sessions: int | None = None) -> None:
        """Answer clients until `stop`, or until `max_sessions` have come and gone; rejected ones do not count.

        A client's failure ends its own session only: it is logged and the last few are kept in `errors`.
        """
        served = 0
        while not self._stopped.is_set() and (max_sessions is None or served < max_sessions):
            if first_ready([Channel(self._listener, "listener")], POLL_SECONDS) is None:
                continue
            try:
                line = Line(accept(self._listener, self.tls), self._stopped)
            except (ShoalError, OSError) as error:
                self._note(error)
                continue
            served += self._session(line)

    def stop(self) -> None:
        """End `serve` and the session in progress within a second; may be called from any thread."""
        self._stopped.set()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
        self._listener.close()

    def _session(self, line: Line) -> bool:
        """Run one session to its end; whether it got beyond the handshake."""
        farewell: dict[str, Any] | None = None
        try:
            self._handshake(line)
            while self._answer(line):
                pass
        except ShoalError as error:
            self._note(error)
            # A refusal speaks of what both know; a later failure may name the server's own paths.
            private = line.worker is not None
            text = (
                "found the session ended by the server; need it open; see the server's log" if private else str(error)
            )
            farewell = {"type": "error", "message": text}
        finally:
            line.end(farewell)
        return line.worker is not None

    def _note(self, error: Exception) -> None:
        self.log.warning("%s", error)
        self.errors = [*self.errors[-19:], str(error)]

    def _handshake(self, line: Line) -> None:
        hello = line.from_peer(("hello",), 10.0)
        compare(hello.get("terms"), self.terms)
        host, port = parse_address(hello.get("link"), "the client's link address")
        if self.tls is None and not is_loopback(host):
            raise ShoalError(f"found link address {host} without TLS; need loopback; pass certificates")
        batch, threads = whole(hello, "batch", self.max_batch), min(whole(hello, "threads", 1024), self.threads)
        own = line.control.sock.getsockname()[0]
        link_port = self.link_port or free_port(own)
        session = secrets.token_hex(16)
        agreed = {"session": session, "shared_weights": self.shared_weights, "threads": threads}
        welcome = {"type": "welcome", "terms": self.terms, "link_port": link_port, "max_batch": self.max_batch}
        line.control.send(welcome | agreed)
        hosts = (f"{own}:{link_port}", f"{host}:{port}")
        line.start(_start_order(self.artifact, SERVER, hosts, agreed, batch, self.tls, self.timeout_s))
        line.from_worker(SETUP_SECONDS)
        line.control.send({"type": "ready"})

    def _answer(self, line: Line) -> bool:
        """Take part in one query; False when the client says goodbye."""
        message = line.from_peer(("query", "bye"), self.timeout_s)
        if message["type"] == "bye":
            return False
        batch = whole(message, "batch", self.max_batch)
        line.order({"type": "query", "batch": batch})
        line.control.send({"type": "go"})
        # SPU's own limit comes first where it waits for the peer; a long computation may take several of them.
        done, _ = line.from_worker(10 * self.timeout_s)
        self.log.info("batch %d: linear %.3f s, relu %.3f s", batch, done["linear_s"], done["relu_s"])
        line.control.send({"type": "done", "memory": done["memory"]})
        return True


class Client:
    """Queries a `Server`; ``with Client(...) as c: c.query(images)``. It never has a weight.

    `artifact_dir` is the artifact or its `client` half. SPU's own connection goes both ways: the server must
    reach this machine too, at the address it connected from and a free port, or at `client_address`
    ``"host:port"`` where that is not so (all interfaces then listen on that port). `connect_s` limits the wait
    for the server, `timeout_s` the wait within a query. `batch` is the size to compile at setup; others are
    compiled when first used. Raises ShoalError for a wrong artifact, missing TLS, and where SPU is not installed.
    """

    def __init__(
        self,
        artifact_dir: Path | str,
        address: str,
        tls: TLS | None,
        *,
        insecure: bool = False,
        timeout_s: float = 600.0,
        connect_s: float = 15.0,
        client_address: str | None = None,
        batch: int = 1,
        threads: int | None = None,
    ) -> None:
        versions = _require_spu()
        host, _ = parse_address(address, "the server's address")
        require_tls(host, tls, insecure)
        self.artifact = load_artifact(artifact_dir, "client")
        self.terms = self.artifact.terms | versions
        self.address, self.tls, self.timeout_s, self.connect_s = address, tls, timeout_s, connect_s
        self.client_address, self.batch, self.threads = client_address, batch, _threads(threads)
        self.max_batch, self.setup_s, self.server_memory_bytes = 0, 0.0, 0
        self.setup: dict[str, float] = {}
        self._line: Line | None = None
        self._stopped = threading.Event()

    def __enter__(self) -> Client:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def open(self) -> None:
        """Connect, agree, make keys, pass weights, compile and warm up; `setup_s` is what that took.

        The warm-up is one small product and ReLU, not a query: it makes all keys and OT state there is.
        Raises ShoalError when the server is absent, refuses, or does not fit.
        """
        started = time.perf_counter()
        line = Line(connect(self.address, self.tls, self.connect_s), self._stopped)
        self._line = line
        with self._ending_on_error(line):
            self._handshake(line)
            ready, _ = line.from_worker(SETUP_SECONDS)
            line.from_peer(("ready",), SETUP_SECONDS)
        self.setup = {k: v for k, v in ready.items() if k.endswith("_s")}
        self.setup_s = time.perf_counter() - started

    def close(self) -> None:
        """Say goodbye and end this side; harmless when it has ended already."""
        if self._line is not None:
            self._line.end({"type": "bye"})
            self._line = None

    def query(self, images: np.ndarray) -> Result:
        """Logits of normalised float `images` [N, C, H, W], which the server does not see.

        Raises ShoalError for images of another shape, type or range (the session goes on), and when the server
        or its answer fails (the session has ended then).
        """
        data = self._encoded(images)
        line = self._line
        if line is None:
            raise ShoalError("found no open session; need one; use `with Client(...) as client` and query inside")
        started = time.perf_counter()
        with self._ending_on_error(line):
            line.control.send({"type": "query", "batch": len(data)})
            line.from_peer(("go",), self.timeout_s)
            line.order({"type": "query", "batch": len(data)}, data.tobytes())
            done, payload = line.from_worker(10 * self.timeout_s)
            memory = line.from_peer(("done",), self.timeout_s).get("memory")
        self.server_memory_bytes = memory if isinstance(memory, int) else 0
        return _result(done, payload, time.perf_counter() - started)

    @contextlib.contextmanager
    def _ending_on_error(self, line: Line) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # After a break in the middle the two sides are out of step, so the session cannot go on.
            line.end({"type": "bye"})
            self._line = None
            raise

    def _handshake(self, line: Line) -> None:
        own, server = _hosts(line.control)
        link = self.client_address or f"{own}:{free_port(own)}"
        _, port = parse_address(link, "client_address")
        hello = {"type": "hello", "terms": self.terms, "link": link, "batch": self.batch, "threads": self.threads}
        line.control.send(hello)
        welcome = line.from_peer(("welcome",), self.connect_s)
        compare(self.terms, welcome.get("terms"))
        self.max_batch = whole(welcome, "max_batch", 1 << 20)
        session, shared = welcome.get("session"), welcome.get("shared_weights")
        if not isinstance(session, str) or not isinstance(shared, bool):
            raise ShoalError(f"found a malformed answer from {line.control.name}; need a shoal server there")
        agreed = {
            "session": session,
            "shared_weights": shared,
            "threads": min(whole(welcome, "threads", 1024), self.threads),
        }
        bind = f"0.0.0.0:{port}" if self.client_address else link
        hosts = (f"{server}:{whole(welcome, 'link_port', 65535)}", bind)
        line.start(_start_order(self.artifact, CLIENT, hosts, agreed, self.batch, self.tls, self.timeout_s))

    def _encoded(self, images: np.ndarray) -> np.ndarray:
        """float32 images rounded to the program's fraction bits, so that SPU's encoding is exact."""
        shape, program = self.artifact.program.input_shape, self.artifact.program
        array = np.asarray(images)
        if array.shape[1:] != shape or not len(array) or array.dtype.kind != "f":
            raise ShoalError(
                f"found {array.dtype} images of shape {array.shape}; need float [N, {', '.join(map(str, shape))}] "
                "with N >= 1; resize and normalise them as the artifact's preprocessing says"
            )
        if self.max_batch and len(array) > self.max_batch:
            raise ShoalError(f"found a batch of {len(array)}; need at most {self.max_batch}; query in parts")
        words = FixedPoint(program.fraction_bits).encode(array, "the images")
        if np.abs(words).max() >= 1 << 24:
            limit = 2 ** (24 - program.fraction_bits)
            raise ShoalError(f"found image values of {limit} or more; need less; normalise the images")
        return np.ascontiguousarray(words.astype(np.float64) / 2**program.fraction_bits, np.float32)


def _hosts(control: Channel) -> tuple[str, str]:
    """This side's and the other side's address; a server that refuses our certificate may be gone already."""
    try:
        return control.sock.getsockname()[0], control.sock.getpeername()[0]
    except OSError as error:
        raise ShoalError(
            f"found that {control.name} is gone after the TLS handshake; need a certificate signed by its authority"
        ) from error


def _result(done: dict[str, Any], payload: bytes, seconds: float) -> Result:
    exits, offset = [], 0
    for shape in done["shapes"]:
        count = int(np.prod(shape))
        exits.append(np.frombuffer(payload, np.float64, count, offset).reshape(shape))
        offset += 8 * count
    moved = done["sent"] + done["received"]
    costs = (seconds, moved, done["messages"], done["relu_s"], done["linear_s"], done["memory"])
    return Result(exits[-1], tuple(exits), *costs)


def _start_order(
    artifact: Artifact,
    rank: int,
    hosts: tuple[str, str],
    agreed: dict[str, Any],
    batch: int,
    tls: TLS | None,
    timeout_s: float,
) -> dict[str, Any]:
    """What the SPU process needs to know to begin."""
    terms = artifact.terms
    settings = {k: terms[k] for k in ("field_bits", "fraction_bits", "ot_kind")}
    settings |= {k: agreed[k] for k in ("shared_weights", "threads")} | {"timeout_s": timeout_s, "link_s": 30.0}
    files = None if tls is None else {k: str(Path(v).resolve()) for k, v in asdict(tls).items()}
    start = {"folder": str(artifact.folder.resolve()), "rank": rank, "hosts": hosts, "session": agreed["session"]}
    return start | {"settings": settings, "batch": batch, "tls": files}


def _require_spu() -> dict[str, str]:
    """Versions of SPU and JAX, which must be the same at both parties; ShoalError where they are absent."""
    if importlib.util.find_spec("spu") is None or importlib.util.find_spec("jax") is None:
        raise ShoalError(
            "found no SPU in this Python; need Python 3.10 or 3.11 with the private extra; "
            "do pip install shoal[private]"
        )
    return {"spu": metadata.version("spu"), "jax": metadata.version("jax")}


def _threads(asked: int | None) -> int:
    # Each thread may open an OT instance, so more than 8 costs memory and setup for little.
    return max(1, min(8, asked or os.cpu_count() or 1))
