"""The client's side: a `Client` owns the images and is the only party that sees the logits.

A control connection (mutual TLS) to the `Server` first checks that both parties agree on the program and the versions.
It then carries one session: queries from prepared randomness, preparation, or direct queries. For the latter two, SPU
runs in a process of its own, over a second connection to the same port.
"""

from __future__ import annotations

import contextlib
import os
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
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.pool import Pool
from shoal.private.serving.client_id import own_name
from shoal.private.serving.direct import DirectQueries, Result, combined
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.prepared import (
    MAX_LIST,
    Offline,
    PreparedQueries,
    Progress,
    Request,
    names_of,
    payload_of,
    prepare,
)
from shoal.private.serving.refill import Proceed, Refill
from shoal.private.serving.server import Server
from shoal.private.serving.session import Session, compare
from shoal.private.serving.spu_link import (
    BACKGROUND,
    SETUP_SECONDS,
    Local,
    link_as_client,
    spu_threads,
    terms_of,
)
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import connect, parse_address, peer_address, require_tls

__all__ = ["TLS", "Client", "ClientOptions", "Result", "Server", "ServerOptions"]


class Client:
    """Queries a `Server` about images that the server never sees; a client never holds a weight.

    Use it as ``with Client(artifact, address, tls) as client: client.query(images)``. `artifact` is the artifact's
    folder or its `client` half, `address` the server's ``"host:port"``, `tls` this party's certificate, key and
    authority (None needs `ClientOptions.insecure`). In prepared mode, make items with `prepare` first, one for each
    image; only one process at a time may hold a pool.

    With `ClientOptions.keep`, a thread keeps that many items ready while the client is open. It starts no batch while
    a query runs, and a query that finds no item waits for one. `refill_error` holds its last failure; it tries again.

    Raises ShoalError for a wrong artifact, for missing TLS files, for a pool in use, and where SPU is not installed.
    """

    def __init__(
        self, artifact: Path | str, address: str, tls: TLS | None, options: ClientOptions = ClientOptions()
    ) -> None:
        host, _ = parse_address(address, "the server's address")
        require_tls(host, tls, options.insecure)
        half = load_artifact(artifact, "client")
        terms = terms_of(half)
        threads = spu_threads(options.spu_threads)
        self.local = Local(half, terms, tls, options.timeout_s, threads, workers=options.hired)
        self.address, self.options = address, options
        self.setup_s, self.setup = 0.0, dict[str, float]()
        self.root = half.folder / "pool" if options.pool is None else Path(options.pool)
        layout, folder = Layout(half.program), self.root / terms["digest"][:16]
        self.pool = Pool(folder, layout, True, options.pool_wait_s) if options.mode == "prepared" else None
        self._making, self._process = threading.Lock(), os.getpid()
        self._refill: Refill | None = None
        self._queries: DirectQueries | PreparedQueries | None = None
        self._stopped = threading.Event()

    def __enter__(self) -> Client:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def server_memory_bytes(self) -> int:
        """Peak memory of the server's SPU process, as of the last direct query; 0 in prepared mode."""
        return self._queries.server_memory_bytes if isinstance(self._queries, DirectQueries) else 0

    def open(self) -> None:
        """Connect and agree; in direct mode also make keys, pass weights and compile. Sets `setup_s`, its seconds.

        Raises ShoalError when the server is absent, refuses, or has another program or version.
        """
        started = time.perf_counter()
        self._stopped.clear()
        session = self._connect()
        with self._ending_on_error(session):
            if self.pool is None:
                direct = DirectQueries(session, self.local, self.options.batch)
                direct.open(self._agree(session, direct.hello()))
                self.setup, self._queries = direct.setup, direct
            else:
                self._meet(session, self.pool)
                self._queries = PreparedQueries(session, self.local, self.pool, self.options.claim_ahead)
        self.setup_s = time.perf_counter() - started
        if self.options.keep is not None and self._refill is None:
            top_up = partial(self.top_up, self.options.keep, batch=self.options.batch)
            self._refill = Refill(self.options.keep, lambda: self.ready, top_up)
            self._refill.start()

    def _meet(self, session: Session, pool: Pool) -> None:
        """Start a session of queries and agree on the items that both parties have."""
        self._agree(session, {"task": "query", "client": self._name()}, payload_of(pool.listed()))
        pool.agree(names_of(session.payload))

    @property
    def ready(self) -> int:
        """Prepared items that are ready here; 0 in direct mode."""
        if isinstance(self._queries, PreparedQueries):
            return self._queries.ready
        return len(self.pool.names()) if self.pool is not None else 0

    @property
    def refill_error(self) -> ShoalError | None:
        """The last failure of the thread that keeps items ready; None if its last attempt succeeded."""
        return None if self._refill is None else self._refill.error

    def close(self) -> None:
        """End the session, a batch that is being made, too. May be called again."""
        if os.getpid() != self._process:
            return  # the session is that of the process that this one was forked from
        if self._refill is not None:
            self._stopped.set()
            self._refill.close()
        if self._queries is not None:
            self._end(self._queries.session)
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
        """Make `count` items with the server, `batch` at a time, over a connection of its own.

        Finished batches stay when a later one fails. This may run in a thread beside queries. After each batch,
        `progress` is called with the items made and asked for; between two batches `proceed` may end the preparation.
        Raises ShoalError in direct mode and when the server's pool is full.
        """
        with self._making:
            return self._prepare_all(self.local, self.own_pool, Request(count, min(batch, count), progress, proceed))

    def top_up(self, keep: int, proceed: Proceed | None = None, *, batch: int = 1) -> int:
        """Make as many items as are missing for `keep` to be ready; returns how many were made.

        First both parties compare their items and delete those that a failure left at one of them. The SPU process runs
        at low priority. Otherwise this works as `prepare`.
        """
        pool, session = self.own_pool, self._connect()
        try:
            self._meet(session, pool)
        finally:
            session.end({"type": "bye"})
        missing, background = keep - len(pool.names()), replace(self.local, nice=BACKGROUND)
        if missing <= 0:
            return 0
        with self._making:
            return self._prepare_all(background, pool, Request(missing, min(batch, missing), None, proceed)).items

    @property
    def own_pool(self) -> Pool:
        """The pool of prepared items. Raises ShoalError in direct mode, which has none."""
        if self.pool is None:
            raise ShoalError("found mode 'direct'; need 'prepared' to make items; open another client")
        return self.pool

    def _prepare_all(self, local: Local, pool: Pool, request: Request) -> Offline:
        """Makes the items, in several sessions where the server ends a turn because other clients wait."""
        cost = self._prepare(local, pool, request)
        while cost.items < request.count and (request.proceed is None or request.proceed()):
            cost.batches += self._prepare(local, pool, request.rest(cost.items)).batches
        return cost

    def _prepare(self, local: Local, pool: Pool, request: Request) -> Offline:
        session = self._connect()
        try:
            hello = {"task": "prepare", "client": self._name(), "threads": local.threads}
            welcome = self._agree(session, hello | {"batch": request.batch})
            link_as_client(session, local, welcome, "prepare", request.batch)
            return prepare(session, local, pool, request)
        finally:
            session.end({"type": "bye"})

    def query(self, images: np.ndarray, *, exit_above: float | None = None) -> Result:
        """Logits of normalised float `images` [N, C, H, W], which the server does not see.

        With `exit_above`, an image stops at the first exit whose largest softmax probability is at least that. The
        server must allow it, because it learns which exit was taken.

        Raises ShoalError for images of another shape, type or range, after which the session goes on; and when the
        server fails, which ends the session.
        """
        self._require_owner()
        words = encoded(self.local.artifact.program, images, rounded=self.options.mode == "direct")
        queries = self._queries
        if queries is None:
            raise ShoalError("found no open session; need one; use `with Client(...) as client` and query inside")
        started = time.perf_counter()
        quiet = contextlib.nullcontext() if self._refill is None else self._refill.paused()
        with quiet, self._ending_on_error(queries.session):
            size, rows = queries.max_batch, []
            for i in range(0, len(words), size):
                if self._refill is not None and not self.ready:
                    self._refill.await_item(self.local.timeout_s)
                rows.append(queries.query(words[i : i + size], exit_above))
        return combined(rows, time.perf_counter() - started, self.options.mode)

    def _require_owner(self) -> None:
        """Raise ShoalError in a process forked from the one that made this client: both would use its session."""
        if os.getpid() != self._process:
            raise ShoalError(
                "found a client made by the process that this one was forked from; need one client in each process; "
                "make it after the fork"
            )

    def _connect(self) -> Session:
        self._require_owner()
        control = connect(self.address, self.local.tls, self.options.connect_s, MAX_LIST)
        try:
            peer_address(control)
        except ShoalError:
            control.close()
            raise
        return Session(control, self._stopped)

    def _agree(self, session: Session, hello: dict[str, Any], payload: bytes = b"") -> dict[str, Any]:
        """Send `hello` and return the server's welcome, after checking that both parties' terms are equal."""
        session.control.send({"type": "hello", "terms": self.local.terms} | hello, payload)
        welcome = session.from_peer(("welcome", "wait"), self.options.connect_s)
        if welcome["type"] == "wait":  # the server's SPU processes are busy; we are in its queue
            welcome = session.from_peer(("welcome",), SETUP_SECONDS)
        compare(self.local.terms, welcome.get("terms"))
        return welcome

    def _name(self) -> str:
        """This pool's name at the server, so that several pools of one certificate do not mix."""
        return own_name(self.root)

    @contextlib.contextmanager
    def _ending_on_error(self, session: Session) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # After an interruption the two parties may be at different steps, so the session cannot go on.
            self._end(session)
            raise

    def _end(self, session: Session) -> None:
        session.end({"type": "bye"})
        if isinstance(self._queries, PreparedQueries):
            self._queries.release()
        self._queries = None
