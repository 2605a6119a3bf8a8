"""The server: accepts clients, agrees on terms, and gives each session a thread of its own."""

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
from shoal.private.program.artifact import load_artifact
from shoal.private.program.program import Weights
from shoal.private.protocol.online import Prepared
from shoal.private.protocol.plan import Plan
from shoal.private.protocol.pool import Pool
from shoal.private.serving.direct import serve_direct
from shoal.private.serving.journal import Journal
from shoal.private.serving.line import POLL_SECONDS, Line, RefusedError, compare, printable
from shoal.private.serving.metrics import Metrics, short_name
from shoal.private.serving.pools import Pools
from shoal.private.serving.prepared import MAX_LIST, serve_preparation, serve_queries
from shoal.private.serving.spu_link import Local, require_spu
from shoal.private.serving.spu_link import threads as threads_for
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import Channel, admit, first_ready, listen, parse_address, require_tls

TASKS = ("direct", "prepare", "query")
ENGINE_WAIT = 120.0
"""Seconds that a client may wait for an SPU process; it leaves the queue by closing the connection."""
UNGREETED = 16
"""Connections that may be in their TLS handshake, or being refused, beyond `max_clients`; more are dropped."""


class Server:
    """Serves one artifact at ``"host:port"`` (port 0 takes a free one), several sessions at a time.

    `artifact_dir` is the artifact or its `server` half. `tls` is this party's certificate, key and authority; every
    client with a certificate of that authority may query. `tls=None` needs `insecure=True` and a loopback host.
    `timeout_s` limits the wait for the peer within a query and between queries. Prepared items are kept in `pool` (by
    default beside the artifact), at most `pool_bytes` a pool and `max_pools` a certificate. `max_clients` sessions may
    be open, `engines` of them with an SPU process (direct mode, preparation); more are refused. `early_exit` lets
    clients end a prepared query at an exit, which tells the server how sure the network was. `link_port` fixes the
    port of SPU's own connection. `shared_weights` secret-shares the weights with the client in direct mode instead of
    keeping them: twice the work, for comparison only. `nice` is added to the niceness of processes that make items, so
    that queries come first. `metrics` counts what happens. Raises ShoalError, at once, for a wrong artifact, missing or
    unusable TLS files, a port in use, and where SPU is not installed.
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
        pool: Path | str | None = None,
        pool_bytes: int = 4 << 30,
        max_pools: int = 64,
        max_clients: int = 8,
        engines: int = 1,
        early_exit: bool = False,
        nice: int = 0,
    ) -> None:
        host, _ = parse_address(address, "the server's address")
        require_tls(host, tls, insecure, server=True)
        artifact = load_artifact(artifact_dir, "server")
        weights = Weights.load(artifact.folder)
        weights.check(artifact.program)
        terms, link = artifact.terms | require_spu(), None if link_port is None else f"{host}:{link_port}"
        count = threads_for(threads)
        self.local = Local(artifact, terms, tls, timeout_s, count, link, max_batch, shared_weights, nice)
        self.plan = Plan(artifact.program)
        self.prepared = Prepared(self.plan, weights)
        root = Path(pool) if pool is not None else artifact.folder / "pool"
        self.pools = Pools(root / terms["digest"][:16], self.plan, max_pools)
        self.pool_bytes, self.max_clients, self.early_exit = pool_bytes, max_clients, early_exit
        self.served = 0
        self._sessions: dict[threading.Thread, Line | None] = {}
        self._guard, self._engines = threading.Lock(), threading.BoundedSemaphore(engines)
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
        """Answer clients until `stop`, or until `max_sessions` have come and gone; rejected ones do not count.

        A client's failure ends its own session only: it is logged and the last few are kept in `errors`.
        """
        with self._serving, contextlib.closing(self._listener):
            waiting = [Channel(self._listener, "listener")]
            while not self._closing.is_set() and (max_sessions is None or self.served < max_sessions):
                if first_ready(waiting, POLL_SECONDS) is not None:
                    self._admit()
        self._drain()

    def stop(self, grace_s: float = 0.0) -> None:
        """End `serve`; may be called from any thread, from a signal's handler, and again with less grace.

        Clients are no longer accepted and sessions between two queries end. A query or batch of items in progress may
        go on for `grace_s` seconds; then all ends within a second.
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
        """Wait for the sessions to end: without limit until `stop`, then as long as it allows."""
        while self._threads() and not self._stopped.is_set():
            if self._closing.is_set() and time.monotonic() > self._deadline:
                self._stopped.set()
            self._threads(wait_s=POLL_SECONDS / 5)
        self._end_sessions()

    def _end_sessions(self) -> None:
        """Each ends itself and says why, unless it is within an inference: there only a closed connection is heard."""
        self._stopped.set()
        self._threads(wait_s=2 * POLL_SECONDS)
        for line in list(self._sessions.values()):
            if line is not None:
                line.control.close()
        self._threads(wait_s=2 * POLL_SECONDS)

    def _threads(self, wait_s: float = 0.0) -> bool:
        """Whether a session is left after at most `wait_s` seconds."""
        limit = time.monotonic() + wait_s
        for thread in list(self._sessions):
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(max(0.0, limit - time.monotonic()))
        return bool(self._sessions)

    def _admit(self) -> None:
        try:
            sock, peer = self._listener.accept()
        except OSError as error:  # the client is gone again, or there are too many open files
            self.journal.failed("accept", error)
            time.sleep(POLL_SECONDS)
            return
        if len(self._sessions) >= self.max_clients + UNGREETED:
            sock.close()
            self.journal.refused(
                "connections", f"found {len(self._sessions)} connections at the server; closed one unheard"
            )
            return
        thread = threading.Thread(target=self._session, args=(sock, peer[0]), daemon=True)
        with self._guard:
            self._sessions[thread] = None
        self.metrics.connected(1)
        thread.start()

    def _session(self, sock: socket.socket, peer: str) -> None:
        """One client, from its TLS handshake to its end."""
        me, agreed = threading.current_thread(), False
        try:
            line = Line(admit(sock, peer, self.local.tls, MAX_LIST), self._stopped, self._closing)
        except (ShoalError, OSError) as error:
            self.journal.failed("tls", error)
        else:
            self._sessions[me] = line
            agreed = self._converse(line)
        finally:
            self.metrics.connected(-1)
            with self._guard:
                self.served += agreed
                del self._sessions[me]

    def _converse(self, line: Line) -> bool:
        """Agree and serve; whether it got beyond the handshake."""
        farewell, agreed = None, False
        try:
            if len(self._sessions) > self.max_clients:
                raise RefusedError(
                    f"found {self.max_clients} clients at the server; need fewer; try again later", "clients"
                )
            hello = line.next_order(("hello",), 10.0)
            compare(hello.get("terms"), self.local.terms)
            task = hello.get("task")
            if task not in TASKS:
                raise ShoalError(f"found task {printable(task, 40)}; need one of {', '.join(TASKS)}")
            self.journal.began(task)
            agreed = task == "query"
            self._serve(line, task, hello)
        except (ShoalError, OSError) as error:
            agreed = agreed or line.worker is not None
            self.journal.ended(error, line, agreed)
            # A refusal speaks of what both know; a later failure may name the server's own paths.
            hidden = "found the session ended by the server; need it open; see the server's log"
            told = isinstance(error, RefusedError) or not agreed
            farewell = {"type": "error", "message": str(error) if told else hidden}
        finally:
            agreed = agreed or line.worker is not None
            line.end(farewell)
        return agreed

    def _serve(self, line: Line, task: str, hello: dict[str, Any]) -> None:
        if task == "query":
            pool = self._pool(line, hello)
            answered = partial(self.journal.answered, "prepared", short_name(pool.folder.name))
            serve_queries(line, self.local, self.prepared, pool, answered, self.early_exit)
            return
        self._queue(line)
        try:
            if task == "direct":
                client = short_name(line.control.identity())
                serve_direct(line, self.local, hello, partial(self.journal.answered, "direct", client))
            else:
                pool = self._pool(line, hello)
                made = partial(self.journal.made, short_name(pool.folder.name))
                serve_preparation(line, self.local, hello, pool, self.pool_bytes, made)
        finally:
            self._engines.release()

    def _queue(self, line: Line) -> None:
        """Wait for a free engine, and have the client wait."""
        if self._engines.acquire(blocking=False):
            return
        line.control.send({"type": "wait"})
        limit = time.monotonic() + ENGINE_WAIT
        while not self._engines.acquire(timeout=POLL_SECONDS):
            if self._closing.is_set() or time.monotonic() > limit or first_ready([line.control], 0) is not None:
                raise RefusedError(
                    "found the server's SPU busy with other clients; need it free; try again later", "engines"
                )

    def _pool(self, line: Line, hello: dict[str, Any]) -> Pool:
        return self.pools.of(line.control.identity(), hello.get("client"))
