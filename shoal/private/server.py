"""The server: accepts clients, agrees on terms, and gives each session a thread of its own."""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from shoal.errors import ShoalError
from shoal.private.artifact import load_artifact
from shoal.private.certs import TLS
from shoal.private.channel import Channel, admit, first_ready, listen, parse_address, require_tls
from shoal.private.direct import serve_direct
from shoal.private.engine import Local, require_spu
from shoal.private.engine import threads as threads_for
from shoal.private.line import POLL_SECONDS, Line, compare, printable
from shoal.private.online import Prepared
from shoal.private.plan import Plan
from shoal.private.pool import Pool
from shoal.private.prepared import MAX_LIST, serve_preparation, serve_queries
from shoal.private.program import Weights

TASKS = ("direct", "prepare", "query")
ENGINE_WAIT = 120.0
"""Seconds that a client may wait for an SPU process; it leaves the queue by closing the connection."""


class Server:
    """Serves one artifact at ``"host:port"`` (port 0 takes a free one), several sessions at a time.

    `artifact_dir` is the artifact or its `server` half. `tls` is this party's certificate, key and authority; every
    client with a certificate of that authority may query. `tls=None` needs `insecure=True` and a loopback host.
    `timeout_s` limits the wait for the peer within a query and between queries. Prepared items are kept in `pool` (by
    default beside the artifact), at most `pool_bytes` a client. `max_clients` sessions may be open, `engines` of them
    with an SPU process (direct mode, preparation); more are refused. `early_exit` lets clients end a
    prepared query at an exit, which tells the server how sure the network was. `link_port` fixes the port of SPU's own
    connection. `shared_weights` secret-shares the weights with the client in direct mode instead of keeping them:
    twice the work, for comparison only. Raises ShoalError, at once, for a wrong artifact, missing or unusable TLS
    files, a port in use, and where SPU is not installed.
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
        max_clients: int = 8,
        engines: int = 1,
        early_exit: bool = False,
    ) -> None:
        host, _ = parse_address(address, "the server's address")
        require_tls(host, tls, insecure, server=True)
        artifact = load_artifact(artifact_dir, "server")
        weights = Weights.load(artifact.folder)
        weights.check(artifact.program)
        terms, link = artifact.terms | require_spu(), None if link_port is None else f"{host}:{link_port}"
        count = threads_for(threads)
        self.local = Local(artifact, terms, tls, timeout_s, count, link, max_batch, shared_weights)
        self.plan = Plan(artifact.program)
        self.prepared = Prepared(self.plan, weights)
        self.root = Path(pool) if pool is not None else artifact.folder / "pool"
        self.pool_bytes, self.max_clients, self.early_exit = pool_bytes, max_clients, early_exit
        self.log = logging.getLogger("shoal.private.server")
        self.errors: list[str] = []
        self.served = 0
        self._pools: dict[str, Pool] = {}
        self._sessions: dict[threading.Thread, Line | None] = {}
        self._guard, self._engines = threading.Lock(), threading.BoundedSemaphore(engines)
        self._stopped = threading.Event()
        self._listener = listen(address)
        self.address = f"{host}:{self._listener.getsockname()[1]}"

    def serve(self, max_sessions: int | None = None) -> None:
        """Answer clients until `stop`, or until `max_sessions` have come and gone; rejected ones do not count.

        A client's failure ends its own session only: it is logged and the last few are kept in `errors`.
        """
        waiting = [Channel(self._listener, "listener")]
        while not self._stopped.is_set() and (max_sessions is None or self.served < max_sessions):
            if first_ready(waiting, POLL_SECONDS) is not None:
                self._admit()
        for thread in list(self._sessions):
            thread.join(2 * POLL_SECONDS if self._stopped.is_set() else None)

    def stop(self) -> None:
        """End `serve` and the sessions in progress within a second; may be called from any thread."""
        self._stopped.set()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
        self._listener.close()
        for line in list(self._sessions.values()):
            if line is not None:
                line.control.close()
        for pool in self._pools.values():
            pool.close()

    def _admit(self) -> None:
        try:
            sock, peer = self._listener.accept()
        except OSError as error:
            if not self._stopped.is_set():  # `__exit__` closes the listener under us
                self._note(error)
            return
        with self._guard:
            thread = threading.Thread(target=self._session, args=(sock, peer[0]), daemon=True)
            self._sessions[thread] = None
        thread.start()

    def _session(self, sock: socket.socket, peer: str) -> None:
        """One client, from its TLS handshake to its end."""
        me = threading.current_thread()
        try:
            line = Line(admit(sock, peer, self.local.tls, MAX_LIST), self._stopped)
            self._sessions[me] = line
            agreed = self._converse(line)
            with self._guard:
                self.served += agreed
        except (ShoalError, OSError) as error:
            self._note(error)
        finally:
            with self._guard:
                del self._sessions[me]

    def _converse(self, line: Line) -> bool:
        """Agree and serve; whether it got beyond the handshake."""
        farewell, agreed = None, False
        try:
            if len(self._sessions) > self.max_clients:
                raise ShoalError(f"found {self.max_clients} clients at the server; need fewer; try again later")
            hello = line.from_peer(("hello",), 10.0)
            compare(hello.get("terms"), self.local.terms)
            task = hello.get("task")
            if task not in TASKS:
                raise ShoalError(f"found task {printable(task, 40)}; need one of {', '.join(TASKS)}")
            agreed = task == "query"
            self._serve(line, task, hello)
        except ShoalError as error:
            self._note(error)
            agreed = agreed or line.worker is not None
            # A refusal speaks of what both know; a later failure may name the server's own paths.
            hidden = "found the session ended by the server; need it open; see the server's log"
            farewell = {"type": "error", "message": hidden if agreed else str(error)}
        finally:
            agreed = agreed or line.worker is not None
            line.end(farewell)
        return agreed

    def _serve(self, line: Line, task: str, hello: dict[str, Any]) -> None:
        if task == "query":
            serve_queries(line, self.local, self.prepared, self._pool(line, hello), self.log, self.early_exit)
            return
        self._queue(line)
        try:
            if task == "direct":
                serve_direct(line, self.local, hello, self.log)
            else:
                serve_preparation(line, self.local, hello, self._pool(line, hello), self.pool_bytes)
        finally:
            self._engines.release()

    def _queue(self, line: Line) -> None:
        """Wait for a free engine, and have the client wait."""
        if self._engines.acquire(blocking=False):
            return
        line.control.send({"type": "wait"})
        limit = time.monotonic() + ENGINE_WAIT
        while not self._engines.acquire(timeout=POLL_SECONDS):
            if self._stopped.is_set() or time.monotonic() > limit or first_ready([line.control], 0) is not None:
                raise ShoalError("found the server's SPU busy with other clients; need it free; try again later")

    def _pool(self, line: Line, hello: dict[str, Any]) -> Pool:
        """The pool of this client: of its certificate and the name that it gives its own."""
        name = hello.get("client")
        if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{16}", name):
            raise ShoalError(f"found client name {printable(name, 40)}; need 16 hex digits; need a shoal client there")
        key = f"{line.control.identity()}-{name}"
        with self._guard:
            if key not in self._pools:
                folder = self.root / self.local.terms["digest"][:16] / key
                self._pools[key] = Pool(folder, self.plan, False)
            return self._pools[key]

    def _note(self, error: Exception) -> None:
        self.log.warning("%s", error)
        self.errors = [*self.errors[-19:], str(error)]
