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
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from shoal.errors import ShoalError
from shoal.private.program.artifact import load_artifact
from shoal.private.program.images import encoded
from shoal.private.protocol.plan import Plan
from shoal.private.protocol.pool import Pool
from shoal.private.serving.direct import DirectSession, Result, combined
from shoal.private.serving.line import Line, compare
from shoal.private.serving.prepared import (
    MAX_LIST,
    MOST_NAMES,
    Offline,
    PreparedSession,
    Progress,
    names_of,
    payload_of,
    prepare,
)
from shoal.private.serving.refill import Proceed, Refill
from shoal.private.serving.server import Server
from shoal.private.serving.spu_link import BACKGROUND, SETUP_SECONDS, Local, hosts_of, offer_link, require_spu
from shoal.private.serving.spu_link import threads as threads_for
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import connect, parse_address, require_tls

__all__ = ["TLS", "Client", "Result", "Server"]

MODES = ("prepared", "direct")


class Client:
    """Queries a `Server`; ``with Client(...) as c: c.query(images)``. It never has a weight.

    `artifact_dir` is the artifact or its `client` half. `mode` "prepared" spends items that `prepare` made, one an
    image, kept in `pool` (by default beside the artifact; one process at a time); "direct" runs all of it in SPU on
    demand. SPU's own connection goes both ways: the server must reach this machine too, at the address it connected
    from and a free port, or at `client_address` ``"host:port"`` where that is not so (all interfaces then listen on
    that port). `connect_s` limits the wait for the server, `timeout_s` the wait within a query, `pool_wait_s` that for
    another process to let go of the pool. `batch` is the size to compile at setup in direct mode; others are compiled
    when first used.

    With `keep`, a thread has that many items ready while the client is open, `batch` at a time: it begins none while a
    query runs, and a query that finds none waits for one. Its last failure is in `refill_error`; it tries again.

    Raises ShoalError for a wrong artifact, missing TLS, a pool in use, and where SPU is not installed.
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
        pool_wait_s: float = 0.0,
        keep: int = 0,
    ) -> None:
        if mode not in MODES:
            raise ShoalError(f"found mode {mode!r}; need one of {', '.join(MODES)}")
        if keep and (mode != "prepared" or not 0 < keep <= MOST_NAMES):
            raise ShoalError(f"found keep={keep} in mode {mode!r}; need prepared mode and 1 to {MOST_NAMES} items")
        host, _ = parse_address(address, "the server's address")
        require_tls(host, tls, insecure)
        artifact = load_artifact(artifact_dir, "client")
        terms = artifact.terms | require_spu()
        self.local = Local(artifact, terms, tls, timeout_s, threads_for(threads), client_address)
        self.address, self.connect_s, self.batch, self.mode = address, connect_s, batch, mode
        self.setup_s, self.setup = 0.0, dict[str, float]()
        self.root = Path(pool) if pool is not None else artifact.folder / "pool"
        plan, folder = Plan(artifact.program), self.root / terms["digest"][:16]
        self.pool = Pool(folder, plan, True, pool_wait_s) if mode == "prepared" else None
        self.keep, self._making = keep, threading.Lock()
        self._refill: Refill | None = None
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
        self._stopped.clear()
        line = self._connect()
        with self._ending_on_error(line):
            if self.pool is None:
                direct = DirectSession(line, self.local, self.batch)
                direct.open(self._agree(line, direct.hello()))
                self.setup, self._session = direct.setup, direct
            else:
                self._meet(line, self.pool)
                self._session = PreparedSession(line, self.local, self.pool)
        self.setup_s = time.perf_counter() - started
        if self.keep and self._refill is None:
            top_up = partial(self.top_up, self.keep, batch=self.batch)
            self._refill = Refill(self.keep, self._ready, top_up)
            self._refill.start()

    def _meet(self, line: Line, pool: Pool) -> None:
        """Agree on a session of queries and on the items that both have."""
        self._agree(line, {"task": "query", "client": self._name()}, payload_of(pool.listed()))
        pool.agree(names_of(line.payload))

    def _ready(self) -> int:
        return len(self.pool.names()) if self.pool is not None else 0

    @property
    def refill_error(self) -> ShoalError | None:
        """Why the thread of `keep` could make no items the last time that it tried; None if it could."""
        return None if self._refill is None else self._refill.error

    def close(self) -> None:
        """Say goodbye and end this side, a batch in the making too; harmless when it has ended already."""
        if self._refill is not None:
            self._stopped.set()
            self._refill.close()
        if self._session is not None:
            self._session.line.end({"type": "bye"})
            self._session = None
        if self.pool is not None:
            self.pool.close()

    def prepare(
        self,
        count: int,
        *,
        batch: int = 1,
        progress: Progress | None = None,
        proceed: Proceed | None = None,
    ) -> Offline:
        """Make `count` items with the server, `batch` at a time, on a connection of its own; what is made stays.

        May run in a thread beside queries. `proceed` is asked between two batches and may end it early.
        Raises ShoalError in direct mode and when the server's room is used up.
        """
        with self._making:
            return self._prepare(self.local, self._own_pool(), count, min(batch, count), progress, proceed)

    def top_up(self, keep: int, proceed: Proceed | None = None, *, batch: int = 1) -> int:
        """Compare items with the server's, and make those missing of `keep`; returns how many were made.

        What a failure left with one party alone goes. The SPU process runs at low priority; otherwise as `prepare`.
        """
        pool, line = self._own_pool(), self._connect()
        try:
            self._meet(line, pool)
        finally:
            line.end({"type": "bye"})
        missing, background = keep - len(pool.names()), replace(self.local, nice=BACKGROUND)
        if missing <= 0:
            return 0
        with self._making:
            return self._prepare(background, pool, missing, min(batch, missing), None, proceed).items

    def _own_pool(self) -> Pool:
        if self.pool is None:
            raise ShoalError("found mode 'direct'; need 'prepared' to make items; open another client")
        return self.pool

    def _prepare(
        self, local: Local, pool: Pool, count: int, batch: int, progress: Progress | None, proceed: Proceed | None
    ) -> Offline:
        line = self._connect()
        try:
            link = offer_link(line.control, local)
            hello = {"task": "prepare", "client": self._name(), "link": link, "threads": local.threads}
            welcome = self._agree(line, hello | {"batch": batch})
            return prepare(line, local, welcome, link, pool, count, batch, progress, proceed)
        finally:
            line.end({"type": "bye"})

    def query(self, images: np.ndarray, *, exit_above: float | None = None) -> Result:
        """Logits of normalised float `images` [N, C, H, W], which the server does not see.

        With `exit_above`, an image leaves at the first exit whose largest softmax probability reaches it. The server
        must allow that, because it learns which exit was taken.

        Raises ShoalError for images of another shape, type or range (the session goes on), and when the server
        or its answer fails (the session has ended then).
        """
        words = encoded(self.local.artifact.program, images, rounded=self.mode == "direct")
        session = self._session
        if session is None:
            raise ShoalError("found no open session; need one; use `with Client(...) as client` and query inside")
        started = time.perf_counter()
        quiet = contextlib.nullcontext() if self._refill is None else self._refill.paused()
        with quiet, self._ending_on_error(session.line):
            size, rows = session.max_batch, []
            for i in range(0, len(words), size):
                if self._refill is not None and not self._ready():
                    self._refill.await_item(self.local.timeout_s)
                rows.append(session.query(words[i : i + size], exit_above))
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
