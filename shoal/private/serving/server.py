"""The server's side: a `Server` owns the weights. It accepts clients and runs each session in a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from shoal.errors import ShoalError
from shoal.private.monitoring.metrics import Metrics, short_name
from shoal.private.program.artifact import Artifact, load_artifact
from shoal.private.program.program import Weights
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.online import Prepared
from shoal.private.protocol.pool import Pool
from shoal.private.serving.budget import Budget
from shoal.private.serving.journal import Journal
from shoal.private.serving.limits import GREETING_SECONDS, Connection, Connections, Engines, Place
from shoal.private.serving.options import GIB, ServerOptions
from shoal.private.serving.pools import Pools
from shoal.private.serving.prepared import MAX_LIST, Allowance, Rules, serve_preparation, serve_queries
from shoal.private.serving.room import Room
from shoal.private.serving.session import POLL_SECONDS, PeerError, RefusedError, Session, compare, printable
from shoal.private.serving.spu_link import Local, spu_threads, terms_of
from shoal.private.transport.allowed import read_fingerprints
from shoal.private.transport.certs import TLS, full_fingerprint
from shoal.private.transport.channel import Channel, admit, first_ready, listen, parse_address, require_tls

TASKS = ("prepare", "query")
HIDDEN = "found the session ended by the server; need it open; see the server's log"
"""What a client hears of an error that is not meant for it."""
ENGINE_WAIT = 120.0
"""Seconds that a client waits for an SPU process. It leaves the queue when it closes the connection."""


class Server:
    """Serves one artifact at ``"host:port"`` (port 0 takes a free one), to several clients at a time.

    `artifact` is the artifact's folder or its `server` half. `tls` is this party's certificate, key and authority;
    every client with a certificate of that authority may query. ``tls=None`` needs `ServerOptions.insecure` and a
    loopback host. `metrics` counts what happens.

    Raises ShoalError, at once, for a wrong artifact, for missing or unusable TLS files, for a port in use, and where
    SPU is not installed.
    """

    def __init__(
        self, artifact: Path | str, address: str, tls: TLS | None, options: ServerOptions = ServerOptions()
    ) -> None:
        host, _ = parse_address(address, "the server's address")
        require_tls(host, tls, options.insecure, server=True)
        _require_list(tls, options)
        half, self.options = load_artifact(artifact, "server"), options
        weights = Weights.load(half.folder)
        weights.check(half.program)
        self.local = _local(half, tls, options)
        self.layout = Layout(half.program)
        self.prepared = Prepared(self.layout, weights, options.threads)
        root = half.folder / "pool" if options.pool is None else Path(options.pool)
        self.pools = Pools(root / half.terms["digest"][:16], self.layout, weights.digest(), options.max_pools)
        self.budget = Budget(self.pools.folder, options.query_budget)
        self.served = 0
        self.connections = Connections(options.max_clients, options.sessions_each)
        self._sessions: dict[threading.Thread, Session | None] = {}
        self._guard, self.engines, self.room = threading.Lock(), Engines(options.engines), Room(root, options)
        self._closing, self._stopped, self._deadline = threading.Event(), threading.Event(), 0.0
        self._serving = threading.Lock()
        self.metrics = Metrics(self.pools.levels)
        self.journal = Journal(self.metrics, self._stopped)
        self._listener = listen(address)
        self.address = f"{host}:{self._listener.getsockname()[1]}"

    @property
    def errors(self) -> list[str]:
        """The last 20 refusals and failures."""
        return self.journal.errors

    def serve(self, max_sessions: int | None = None) -> None:
        """Answer clients until `stop`, or until `max_sessions` sessions have ended. Refused clients do not count.

        A client's failure ends only its own session. It is logged, and `errors` keeps the last ones.
        """
        with self._serving, contextlib.closing(self._listener):
            waiting = [Channel(self._listener, "listener")]
            while not self._closing.is_set() and (max_sessions is None or self.served < max_sessions):
                if first_ready(waiting, POLL_SECONDS) is not None:
                    self._admit()
                self.connections.expire()
        self._drain()

    def stop(self, grace_s: float = 0.0) -> None:
        """End `serve`. May be called from any thread and from signal handlers, and again with less grace.

        No more clients are accepted, and sessions between two queries end. Queries and batches of items in progress
        may take `grace_s` more seconds; then everything ends within a second.
        """
        self._deadline = time.monotonic() + grace_s
        self._closing.set()
        if grace_s <= 0:
            self._stopped.set()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
        with self._serving:  # a `serve` in another thread still looks at the listener
            self._listener.close()
        self._end_sessions()
        self.pools.close()

    def _drain(self) -> None:
        """Wait for the sessions to end: without limit before `stop`, afterwards as long as its grace."""
        while self._threads() and not self._stopped.is_set():
            if self._closing.is_set() and time.monotonic() > self._deadline:
                self._stopped.set()
            self._threads(wait_s=POLL_SECONDS / 5)
            self.connections.expire()
        self._end_sessions()

    def _end_sessions(self) -> None:
        """End all sessions. Those within an inference notice only that their connection is closed."""
        self._stopped.set()
        self._threads(wait_s=2 * POLL_SECONDS)
        for session in list(self._sessions.values()):
            if session is not None:
                session.control.close()
        self._threads(wait_s=2 * POLL_SECONDS)

    def _threads(self, wait_s: float = 0.0) -> bool:
        """Whether any session is left after waiting at most `wait_s` seconds."""
        limit = time.monotonic() + wait_s
        for thread in list(self._sessions):
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(max(0.0, limit - time.monotonic()))
        return bool(self._sessions)

    def _admit(self) -> None:
        try:
            sock, peer = self._listener.accept()
        except OSError as error:  # the client has left, or too many files are open
            self.journal.failed("accept", error)
            time.sleep(POLL_SECONDS)
            return
        thread = threading.Thread(target=self._session, args=(sock, self.connections.enter(sock, peer[0])), daemon=True)
        with self._guard:
            self._sessions[thread] = None
        self.metrics.connected(1)
        thread.start()

    def _session(self, sock: socket.socket, connection: Connection) -> None:
        """One client's connection, from the TLS handshake to the end."""
        me, agreed = threading.current_thread(), False
        try:
            channel = admit(sock, connection.host, self.local.tls, MAX_LIST, GREETING_SECONDS)
            session = Session(channel, self._stopped, self._closing)
        except (ShoalError, OSError) as error:
            self._failed_early("tls", connection, error)
        else:
            self._sessions[me] = session
            agreed = self._converse(session, connection)
        finally:
            self.metrics.connected(-1)
            self.connections.leave(connection)
            with self._guard:
                self.served += agreed
                del self._sessions[me]

    def _failed_early(self, kind: str, connection: Connection, error: Exception) -> None:
        """A connection ended before its session began: by the limits for silent ones, or by a failure of its own."""
        if connection.cut:
            self.journal.refused("connections", f"{connection.cut}; closed one of {connection.host}")
        else:
            self.journal.failed(kind, error)

    def _converse(self, session: Session, connection: Connection) -> bool:
        """Hear the first message, agree on the terms and serve; returns whether the session began."""
        farewell, agreed = None, False
        try:
            hello = session.next_order(("hello", "link"), GREETING_SECONDS)
            self.connections.greet(connection)
            self._require_allowed(session.control)
            if hello["type"] == "link":  # the second connection of a session, which now has it
                self.local.links.hand_over(session.control, hello.get("token"))
                session.handed_over = True
                return False
            self.connections.begin(connection, session.control.identity())
            compare(hello.get("terms"), self.local.terms)
            task = hello.get("task")
            if task not in TASKS:
                raise PeerError(f"found task {printable(task, 40)}; need one of {', '.join(TASKS)}")
            self.journal.began(task)
            agreed = task == "query"
            self._serve(session, task, hello)
        except (ShoalError, OSError) as error:
            agreed = agreed or session.worker is not None
            if connection.cut:
                self._failed_early("handshake", connection, error)
            else:
                self.journal.ended(error, session, agreed)
            # Other errors may contain paths and addresses of the server.
            told = str(error) if isinstance(error, PeerError) else HIDDEN
            farewell = {"type": "error", "message": told}
        finally:
            agreed = agreed or session.worker is not None
            session.end(farewell)
        return agreed

    def _require_allowed(self, control: Channel) -> None:
        """Raise RefusedError unless the operator's list has the client's certificate."""
        certificate = control.certificate()
        if self.options.allow is None or certificate is None:
            return
        found = full_fingerprint(certificate)
        if found not in read_fingerprints(self.options.allow):
            raise RefusedError(
                f"found a certificate with the fingerprint {found} that this server does not admit; need one of its "
                "list; ask its operator",
                "allow",
            )

    def _serve(self, session: Session, task: str, hello: dict[str, Any]) -> None:
        if task == "query":
            pool, identity = self._pool(session, hello), session.control.identity()
            self.budget.require(identity)
            answered = partial(self.journal.answered, short_name(pool.folder.name))
            rules = Rules(partial(self.budget.spend, identity), answered, self.options.early_exit)
            serve_queries(session, self.local, self.prepared, pool, rules)
            return
        with self.engines.place(session.control.identity()) as place:
            self._queue(session, place)
            self.budget.require(session.control.identity())
            pool = self._pool(session, hello)
            made = partial(self.journal.made, short_name(pool.folder.name))
            serve_preparation(session, self.local, hello, pool, Allowance(place, self.room), made)

    def _queue(self, session: Session, place: Place) -> None:
        """Wait for a free SPU process, and tell the client to wait."""
        if place.wait(0):
            return
        session.control.send({"type": "wait"})
        limit = time.monotonic() + ENGINE_WAIT
        while not place.wait(POLL_SECONDS):
            if self._closing.is_set() or time.monotonic() > limit or first_ready([session.control], 0) is not None:
                raise RefusedError(
                    "found the server's SPU busy with other clients; need it free; try again later", "engines"
                )

    def _pool(self, session: Session, hello: dict[str, Any]) -> Pool:
        return self.pools.of(session.control.identity(), hello.get("client"))


def _require_list(tls: TLS | None, options: ServerOptions) -> None:
    """Raise ShoalError for a list of certificates that cannot be read, or that nothing can be compared with."""
    if options.allow is None:
        return
    read_fingerprints(options.allow)
    if tls is None:
        raise ShoalError(
            "found a list of certificates (allow) without TLS; need TLS to have certificates; leave one out"
        )


def _local(half: Artifact, tls: TLS | None, options: ServerOptions) -> Local:
    """What this server brings to its sessions."""
    return Local(
        half,
        terms_of(half),
        tls,
        options.timeout_s,
        spu_threads(options.spu_threads),
        options.max_batch,
        options.products,
        options.nice,
        options.hired,
        int(options.weight_cache_gib * GIB),
    )
