"""The client's side: a `Client` owns the images and is the only party that sees the logits.

A control connection (mutual TLS) to the `Server` first checks that both parties agree on the program and the versions.
It then carries one session: queries from prepared randomness, or preparation. For the latter, SPU runs in a process of
its own, over a second connection to the same port.
"""

from __future__ import annotations

import contextlib
import logging
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
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.pools import own_name
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
from shoal.private.serving.result import Result, combined
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

LOG = logging.getLogger("shoal.private.serving.client")
ON_DEMAND = 8
"""Most items that a query makes in one go when none is ready: they take room at both parties until they are used."""


class Client:
    """Queries a `Server` about images that the server never sees; a client never holds a weight.

    Use it as ``with Client(artifact, address, tls) as client: client.query(images)``. `artifact` is the artifact's
    folder or its `client` half, `address` the server's ``"host:port"``, `tls` this party's certificate, key and
    authority (None needs `ClientOptions.insecure`). Each image spends one prepared item. `prepare` makes items ahead; a
    query that finds none makes them first, which takes much longer. Only one process at a time may hold a pool.

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
        self.setup_s = 0.0
        self.root = half.folder / "pool" if options.pool is None else Path(options.pool)
        layout, folder = Layout(half.program), self.root / terms["digest"][:16]
        self.pool = Pool(folder, layout, True, options.pool_wait_s)
        self._making, self._process = threading.Lock(), os.getpid()
        self._refill: Refill | None = None
        self._queries: PreparedQueries | None = None
        self._stopped = threading.Event()

    def __enter__(self) -> Client:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def open(self) -> None:
        """Connect and agree. Sets `setup_s`, its seconds.

        Raises ShoalError when the server is absent, refuses, or has another program or version.
        """
        started = time.perf_counter()
        self._stopped.clear()
        self._queries = self._begin()
        self.setup_s = time.perf_counter() - started
        if self.options.keep is not None and self._refill is None:
            top_up = partial(self.top_up, self.options.keep, batch=self.options.batch)
            self._refill = Refill(self.options.keep, lambda: self.ready, top_up)
            self._refill.start()

    def _begin(self) -> PreparedQueries:
        """Begin a session of queries."""
        session = self._connect()
        with self._ending_on_error(session):
            self._meet(session)
        return PreparedQueries(session, self.local, self.pool, self.options.claim_ahead)

    def _meet(self, session: Session) -> None:
        """Start a session of queries and agree on the items that both parties have."""
        self._agree(session, {"task": "query", "client": self._name()}, payload_of(self.pool.listed()))
        self.pool.agree(names_of(session.payload))

    @property
    def ready(self) -> int:
        """Prepared items that are ready here."""
        return len(self.pool.names()) if self._queries is None else self._queries.ready

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
        self._end_queries()
        self.pool.close()

    def _end_queries(self) -> None:
        if self._queries is not None:
            self._end(self._queries.session)

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
        Raises ShoalError when the server's pool is full.
        """
        with self._making:
            return self._prepare_all(self.local, Request(count, min(batch, count), progress, proceed))

    def top_up(self, keep: int, proceed: Proceed | None = None, *, batch: int = 1) -> int:
        """Make as many items as are missing for `keep` to be ready; returns how many were made.

        First both parties compare their items and delete those that a failure left at one of them. The SPU process runs
        at low priority. Otherwise this works as `prepare`.
        """
        session = self._connect()
        try:
            self._meet(session)
        finally:
            session.end({"type": "bye"})
        missing, background = keep - self.ready, replace(self.local, nice=BACKGROUND)
        if missing <= 0:
            return 0
        with self._making:
            return self._prepare_all(background, Request(missing, min(batch, missing), None, proceed)).items

    def _prepare_all(self, local: Local, request: Request) -> Offline:
        """Makes the items, in several sessions where the server ends a turn because other clients wait."""
        cost = self._prepare(local, request)
        while cost.items < request.count and (request.proceed is None or request.proceed()):
            cost.batches += self._prepare(local, request.rest(cost.items)).batches
        return cost

    def _prepare(self, local: Local, request: Request) -> Offline:
        session = self._connect()
        try:
            hello = {"task": "prepare", "client": self._name(), "threads": local.threads}
            welcome = self._agree(session, hello | {"batch": request.batch})
            link_as_client(session, local, welcome, request.batch)
            return prepare(session, local, self.pool, request)
        finally:
            session.end({"type": "bye"})

    def query(self, images: np.ndarray, *, exit_above: float | None = None) -> Result:
        """Logits of normalised float `images` [N, C, H, W], which the server does not see.

        With `exit_above`, an image stops at the first exit whose largest softmax probability is at least that. The
        server must allow it, because it learns which exit was taken.

        An image that finds no ready item waits: with `ClientOptions.keep` for the thread that makes items, else for
        items made at once, for this and the next images. The log and `Result.made` say so.

        Raises ShoalError for images of another shape, type or range, after which the session goes on; and when the
        server fails, which ends the session.
        """
        self._require_owner()
        words = encoded(self.local.artifact.program, images)
        if self._queries is None:
            raise ShoalError("found no open session; need one; use `with Client(...) as client` and query inside")
        started, made, making_s, rows = time.perf_counter(), 0, 0.0, []
        with contextlib.nullcontext() if self._refill is None else self._refill.paused():
            for i in range(len(words)):
                if not self.ready:
                    more, seconds = self._await_items(len(words) - i)
                    made, making_s = made + more, making_s + seconds
                queries = self._queries
                with self._ending_on_error(queries.session):
                    rows.append(queries.query(words[i : i + 1], exit_above))
        return combined(rows, time.perf_counter() - started - making_s, made, making_s)

    def _await_items(self, wanted: int) -> tuple[int, float]:
        """Wait for the thread that makes items, or make some of those `wanted`; returns how many, and the seconds."""
        if self._refill is not None:
            self._refill.await_item(self.local.timeout_s)
            return 0, 0.0
        begun, count, made = time.perf_counter(), min(wanted, ON_DEMAND), 0
        LOG.warning("no item is ready; making %d now; make items ahead to get answers at once", count)
        # The server would end a session of queries that stays silent for longer than its time-out.
        self._end_queries()
        with self._making:
            if not self.ready:  # another thread may have made some meanwhile
                made = self._prepare_all(self.local, Request(count, min(self.options.batch, count))).items
        self._queries = self._begin()
        return made, time.perf_counter() - begun

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
        if self._queries is not None:
            self._queries.release()
        self._queries = None
