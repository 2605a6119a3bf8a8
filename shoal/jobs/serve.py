"""What the long-running commands share with an operator: signals, logs, figures, and an orderly end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from shoal.errors import ShoalError
from shoal.jobs.query import Connection
from shoal.storage.files import write_text

SIGNALS = (signal.SIGTERM, signal.SIGINT)
CONNECT_SECONDS = 3.0
"""How long one attempt to keep a pool filled waits for the server; the next comes later."""


@dataclass(frozen=True)
class Operation:
    """How a server is run: `grace_s` seconds for queries in progress when it is asked to end, figures and logs.

    `sessions` ends it after so many; `ready` is a file that gets the address once it listens; `threads` are those of
    a query's plain products, see `share_cores`.
    """

    sessions: int | None = None
    grace_s: float = 5.0
    metrics: Path | None = None
    metrics_port: int | None = None
    ready: Path | None = None
    json: bool = False
    threads: int | None = None


def share_cores(threads: int | None = None) -> None:
    """Let this process compute plain products with `threads`, half of its cores if None.

    Threads that wait for the next product spin: with one a core they slow down who shares the machine, be it another
    session or the other party. Raises ShoalError for less than 1.
    """
    import torch

    if threads is not None and threads < 1:
        raise ShoalError(f"found {threads} threads; need 1 or more; leave --threads out for half of the cores")
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // 2))


def serve(artifact: Path, listen: str, tls: Any, operation: Operation, choices: dict[str, Any]) -> None:
    """Serve sessions until SIGTERM or Ctrl-C, then end in order. `choices` are the Server's own."""
    from shoal.private.serving.monitor import Monitor
    from shoal.private.serving.server import Server
    from shoal.private.serving.spu_link import BACKGROUND

    share_cores(operation.threads)
    server = Server(artifact, listen, tls, nice=BACKGROUND, **choices)
    # The server ends first, so that the last figures are those of its end.
    with Monitor(server.metrics.snapshot, operation.metrics, operation.metrics_port) as monitor, server:
        log_to_standard_error(operation.json)
        with _ending(server.stop, operation.grace_s):
            if operation.ready is not None:
                write_text(operation.ready, server.address + "\n")
            logging.info("serving %s at %s", artifact, server.address)
            if monitor.address is not None:
                logging.info("metrics at http://%s/metrics", monitor.address)
            server.serve(operation.sessions)
    logging.info("served until the end")


@contextlib.contextmanager
def _ending(stop: Callable[[float], None], grace_s: float) -> Iterator[None]:
    """The first signal stops with grace, the second at once; a third does what it does to any program."""
    out, into = os.pipe()
    count = 0

    def heard(number: int, frame: FrameType | None) -> None:
        # Nothing but a byte: the interrupted thread may hold any lock that `stop` takes.
        nonlocal count
        count += 1
        os.write(into, b".")
        if count == 2:
            for again in SIGNALS:
                signal.signal(again, signal.SIG_DFL)

    def watch() -> None:
        for grace in (grace_s, 0.0):
            if os.read(out, 1):
                stop(grace)

    before = [signal.signal(number, heard) for number in SIGNALS]
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
        os.close(into)
        watcher.join()
        os.close(out)


def keep(artifact: Path, connection: Connection, items: int, batch: int, as_json: bool) -> None:
    """Have `items` ready until SIGTERM or Ctrl-C: whatever is missing is made, `batch` at a time.

    The pool is let go between batches when another process waits for it. Raises ShoalError at once for what waiting
    does not mend (a wrong artifact, unusable TLS files); later failures are logged and tried again.
    """
    from shoal.private.protocol.pool import ready_names
    from shoal.private.serving.prepared import MOST_NAMES
    from shoal.private.serving.refill import POLL_SECONDS, Backoff

    if not 1 <= items <= MOST_NAMES or batch < 1:
        raise ShoalError(f"found {items} items to keep in batches of {batch}; need 1 to {MOST_NAMES} and 1 or more")
    log_to_standard_error(as_json)
    client = connection.client(artifact)
    folder, backoff = client.pool.folder, Backoff()
    client.close()
    logging.info("keeping %d items ready at %s", items, folder)
    with contextlib.suppress(KeyboardInterrupt), _interrupted_by_sigterm():
        while True:
            wait = POLL_SECONDS
            try:
                if len(ready_names(folder)) < items:
                    _top_up(artifact, connection, items, batch)
                    backoff.failures = 0
            except (ShoalError, OSError) as error:
                wait = backoff.failed(error)
            time.sleep(wait)
    logging.info("ended")


def _top_up(artifact: Path, connection: Connection, items: int, batch: int) -> None:
    client = connection.client(artifact, pool_wait_s=0.0, connect_s=CONNECT_SECONDS)
    try:
        made = client.top_up(items, lambda: not client.pool.wanted(), batch=batch)
        ready = len(client.pool.names())
        logging.info("%d items made, %d ready", made, ready, extra={"facts": {"made": made, "ready": ready}})
    finally:
        client.close()


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM as Ctrl-C: a batch in the making is dropped, and what is finished stays."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, message, and the record's `facts` if it has some."""

    def format(self, record: logging.LogRecord) -> str:
        """See the class."""
        body = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        return json.dumps(body | getattr(record, "facts", {}))


def log_to_standard_error(as_json: bool) -> None:
    """Log from INFO on, as text or as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
