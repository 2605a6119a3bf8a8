"""The two parties: a `Server` that owns the weights and a `Client` that owns the images and alone sees logits.

The control connection (mutual TLS) compares what must agree, then carries one session: direct queries, queries from
prepared randomness, or its making. SPU, where a session needs it, runs over a second connection, in its own process.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from shoal.errors import ShoalError
from shoal.private.artifact import load_artifact
from shoal.private.certs import TLS
from shoal.private.channel import connect, parse_address, require_tls
from shoal.private.direct import DirectSession, Result, combined
from shoal.private.engine import SETUP_SECONDS, Local, hosts_of, offer_link, require_spu
from shoal.private.engine import threads as threads_for
from shoal.private.fixed import FixedPoint
from shoal.private.line import Line, compare
from shoal.private.plan import Plan
from shoal.private.pool import Pool
from shoal.private.prepared import MAX_LIST, Offline, PreparedSession, Progress, names_of, payload_of, prepare
from shoal.private.server import Server

__all__ = ["TLS", "Client", "Result", "Server"]

MODES = ("prepared", "direct")


class Client:
    """Queries a `Server`; ``with Client(...) as c: c.query(images)``. It never has a weight.

    `artifact_dir` is the artifact or its `client` half. `mode` "prepared" spends items that `prepare` made, one an
    image, kept in `pool` (by default beside the artifact; one process at a time); "direct" runs all of it in SPU on
    demand. SPU's own connection goes both ways: the server must reach this machine too, at the address it connected
    from and a free port, or at `client_address` ``"host:port"`` where that is not so (all interfaces then listen on
    that port). `connect_s` limits the wait for the server, `timeout_s` the wait within a query. `batch` is the size to
    compile at setup in direct mode; others are compiled when first used. Raises ShoalError for a wrong artifact,
    missing TLS, a pool in use, and where SPU is not installed.
    """

    def __init__(
        self,
        artifact_dir: Path | str,
        address: str,
        tls: TLS | None,
        *,
        mode: str = "prepared",
        pool: Path | str | None = None,
        insecure: bool = False,
        timeout_s: float = 600.0,
        connect_s: float = 15.0,
        client_address: str | None = None,
        batch: int = 1,
        threads: int | None = None,
    ) -> None:
        if mode not in MODES:
            raise ShoalError(f"found mode {mode!r}; need one of {', '.join(MODES)}")
        host, _ = parse_address(address, "the server's address")
        require_tls(host, tls, insecure)
        artifact = load_artifact(artifact_dir, "client")
        terms = artifact.terms | require_spu()
        self.local = Local(artifact, terms, tls, timeout_s, threads_for(threads), client_address)
        self.address, self.connect_s, self.batch, self.mode = address, connect_s, batch, mode
        self.setup_s, self.setup = 0.0, dict[str, float]()
        self.root = Path(pool) if pool is not None else artifact.folder / "pool"
        self.pool = Pool(self.root / terms["digest"][:16], Plan(artifact.program), True) if mode == "prepared" else None
        self._session: DirectSession | PreparedSession | None = None
        self._stopped = threading.Event()

    def __enter__(self) -> Client:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def server_memory_bytes(self) -> int:
        """Peak of the server's SPU process as of the last direct query."""
        return self._session.server_memory_bytes if isinstance(self._session, DirectSession) else 0

    def open(self) -> None:
        """Connect and agree; in direct mode also make keys, pass weights, compile. `setup_s` is what that took.

        Raises ShoalError when the server is absent, refuses, or does not fit.
        """
        started = time.perf_counter()
        line = self._connect()
        with self._ending_on_error(line):
            if self.pool is None:
                direct = DirectSession(line, self.local, self.batch)
                direct.open(self._agree(line, direct.hello()))
                self.setup, self._session = direct.setup, direct
            else:
                self._agree(line, {"task": "query", "client": self._name()}, payload_of(self.pool.everything()))
                self._session = PreparedSession(line, self.local, self.pool, names_of(line.payload))
        self.setup_s = time.perf_counter() - started

    def close(self) -> None:
        """Say goodbye and end this side; harmless when it has ended already."""
        if self._session is not None:
            self._session.line.end({"type": "bye"})
            self._session = None
        if self.pool is not None:
            self.pool.close()

    def prepare(self, count: int, *, batch: int = 1, progress: Progress | None = None) -> Offline:
        """Make `count` items with the server, `batch` at a time, on a connection of its own; what is made stays.

        May run in a thread beside queries. Raises ShoalError in direct mode and when the server's room is
        used up.
        """
        if self.pool is None:
            raise ShoalError("found mode 'direct'; need 'prepared' to make items; open another client")
        line = self._connect()
        try:
            link = offer_link(line.control, self.local)
            hello = {"task": "prepare", "client": self._name(), "link": link, "threads": self.local.threads}
            welcome = self._agree(line, hello | {"batch": min(batch, count)})
            return prepare(line, self.local, welcome, link, self.pool, count, min(batch, count), progress)
        finally:
            line.end({"type": "bye"})

    def query(self, images: np.ndarray, *, exit_above: float | None = None) -> Result:
        """Logits of normalised float `images` [N, C, H, W], which the server does not see.

        With `exit_above`, an image leaves at the first exit whose largest softmax probability reaches it. The server
        must allow that, because it learns which exit was taken.

        Raises ShoalError for images of another shape, type or range (the session goes on), and when the server
        or its answer fails (the session has ended then).
        """
        words = self._encoded(images)
        session = self._session
        if session is None:
            raise ShoalError("found no open session; need one; use `with Client(...) as client` and query inside")
        started = time.perf_counter()
        with self._ending_on_error(session.line):
            size = session.max_batch
            rows = [session.query(words[i : i + size], exit_above) for i in range(0, len(words), size)]
        return combined(rows, time.perf_counter() - started, self.mode)

    def _connect(self) -> Line:
        control = connect(self.address, self.local.tls, self.connect_s, MAX_LIST)
        try:
            hosts_of(control)
        except ShoalError:
            control.close()
            raise
        return Line(control, self._stopped)

    def _agree(self, line: Line, hello: dict[str, Any], payload: bytes = b"") -> dict[str, Any]:
        """The server's welcome to a session whose terms are the same at both."""
        line.control.send({"type": "hello", "terms": self.local.terms} | hello, payload)
        welcome = line.from_peer(("welcome", "wait"), self.connect_s)
        if welcome["type"] == "wait":  # the server's SPU processes are busy; we are in its queue
            welcome = line.from_peer(("welcome",), SETUP_SECONDS)
        compare(self.local.terms, welcome.get("terms"))
        return welcome

    def _name(self) -> str:
        """This pool's own name at the server: two pools under one certificate must not share the server's halves."""
        path = self.root / "client-id"
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        name = path.read_text().strip()
        if not re.fullmatch("[0-9a-f]{16}", name):
            raise ShoalError(f"found {name[:40]!r} at {path}; need 16 hex digits; remove it and the pool")
        return name

    @contextlib.contextmanager
    def _ending_on_error(self, line: Line) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # After a break in the middle the two sides are out of step, so the session cannot go on.
            line.end({"type": "bye"})
            self._session = None
            raise

    def _encoded(self, images: np.ndarray) -> np.ndarray:
        """Images as int64 words; in direct mode as float32 rounded to them, so that SPU's encoding is exact."""
        shape, program = self.local.artifact.program.input_shape, self.local.artifact.program
        array = np.asarray(images)
        if array.shape[1:] != shape or not len(array) or array.dtype.kind != "f":
            raise ShoalError(
                f"found {array.dtype} images of shape {array.shape}; need float [N, {', '.join(map(str, shape))}] "
                "with N >= 1; resize and normalise them as the artifact's preprocessing says"
            )
        words = FixedPoint(program.fraction_bits).encode(array, "the images")
        if np.abs(words).max() >= 1 << 24:
            limit = 2 ** (24 - program.fraction_bits)
            raise ShoalError(f"found image values of {limit} or more; need less; normalise the images")
        if self.mode == "prepared":
            return words
        return np.ascontiguousarray(words.astype(np.float64) / 2**program.fraction_bits, np.float32)
