"""The jobs of `shoal serve` and `shoal prepare --keep`, which run until they are stopped: signals, logs and figures."""

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import torch

from shoal.errors import ShoalError
from shoal.jobs.query import Connection, with_pool_wait
from shoal.private.monitoring.monitor import Monitor
from shoal.private.protocol.pool import ready_names
from shoal.private.serving.client import Client
from shoal.private.serving.options import MOST_ITEMS, ClientOptions, ServerOptions
from shoal.private.serving.refill import POLL_SECONDS, Backoff
from shoal.private.serving.server import Server
from shoal.private.serving.spu_link import BACKGROUND
from shoal.private.transport.certs import TLS
from shoal.progress import VERBOSE, verbosity
from shoal.storage.files import write_text

SIGNALS = (signal.SIGTERM, signal.SIGINT)
CONNECT_SECONDS = 3.0
"""Seconds for which one attempt to fill a pool waits for the server; it is tried again later."""


@dataclass(frozen=True)
class Operation:
    """Options of `shoal serve`: how the process runs, and what it reports."""

    threads: int | None = None
    """Number of CPU threads for the convolutions of a prepared query; one for each core if left out."""
    sessions: int | None = None
    """Stop after this many client sessions; run until stopped if left out."""
    grace_s: float = field(default=5.0, metadata={"cli": "--grace"})
    """Seconds that queries in progress may take to finish after SIGTERM or Ctrl-C. A second signal stops at once."""
    metrics: Path | None = None
    """JSON file to which the server writes its metrics every 5 seconds."""
    metrics_port: int | None = None
    """Port at which Prometheus can read the metrics, at http://127.0.0.1:PORT/metrics; 0 means a free port."""
    ready_file: Path | None = None
    """File to which the server writes its host:port as soon as it listens."""
    json: bool = False
    """Write the log as JSON, one object on each line."""


def share_cores(threads: int | None = None) -> int:
    """The number of threads that share a convolution: `threads`, or one for each core if None.

    They sleep while there is nothing to do. Torch's own threads, which keep a core busy while they wait for the next
    product, are reduced to one. Raises ShoalError for less than 1.
    """
    if threads is not None and threads < 1:
        raise ShoalError(f"found {threads} threads; need 1 or more; leave --threads out for one for each core")
    torch.set_num_threads(1)
    return threads or os.cpu_count() or 1


def serve(artifact: Path, listen: str, tls: TLS | None, options: ServerOptions, operation: Operation) -> None:
    """Serve sessions until SIGTERM or Ctrl-C, then let queries in progress finish, and stop.

    Raises ShoalError for a wrong artifact, unusable TLS files, and an address that cannot be used.
    """
    threads = share_cores(operation.threads)
    server = Server(artifact, listen, tls, replace(options, nice=BACKGROUND, threads=threads))
    # The server ends before the monitor, so that the last figures include its end.
    with Monitor(server.metrics.snapshot, operation.metrics, operation.metrics_port) as monitor, server:
        log_to_standard_error(operation.json)
        with _ending(server.stop, operation.grace_s):
            if operation.ready_file is not None:
                write_text(operation.ready_file, server.address + "\n")
            logging.info("serving %s at %s", artifact, server.address)
            if monitor.address is not None:
                logging.info("metrics at http://%s/metrics", monitor.address)
            server.serve(operation.sessions)
    logging.info("served until the end")


@contextlib.contextmanager
def _ending(stop: Callable[[float], None], grace_s: float) -> Iterator[None]:
    """On the first signal, stop after at most `grace_s` seconds; on the second, at once; a third kills the process."""
    out, into = os.pipe()
    count = 0

    def heard(number: int, frame: FrameType | None) -> None:
        # Only write a byte: the interrupted thread may hold a lock that `stop` needs.
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


def keep(artifact: Path, items: int, batch: int, connection: Connection, options: ClientOptions, as_json: bool) -> None:
    """Keep `items` prepared items ready until SIGTERM or Ctrl-C: make missing ones, `batch` at a time.

    Between batches the pool is released if another process waits for it. Raises ShoalError at once for permanent
    errors (a wrong artifact, unusable TLS files); after later errors, which are logged, it tries again.
    """
    if not 1 <= items <= MOST_ITEMS or batch < 1:
        raise ShoalError(f"found {items} items to keep in batches of {batch}; need 1 to {MOST_ITEMS} and 1 or more")
    log_to_standard_error(as_json)
    client = connection.client(artifact, with_pool_wait(options))
    folder, backoff = client.pool.folder, Backoff()
    client.close()
    logging.info("keeping %d items ready at %s", items, folder)
    attempt = replace(options, pool_wait_s=0.0, connect_s=CONNECT_SECONDS)
    with contextlib.suppress(KeyboardInterrupt), _interrupted_by_sigterm():
        while True:
            wait = POLL_SECONDS
            try:
                if len(ready_names(folder)) < items:
                    _top_up(connection.client(artifact, attempt), items, batch)
                    backoff.failures = 0
            except (ShoalError, OSError) as error:
                wait = backoff.failed(error)
            time.sleep(wait)
    logging.info("ended")


def _top_up(client: Client, items: int, batch: int) -> None:
    try:
        made = client.top_up(items, lambda: not client.pool.wanted(), batch=batch)
        ready = client.ready
        logging.info("%d items made, %d ready", made, ready, extra={"facts": {"made": made, "ready": ready}})
    finally:
        client.close()


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C: an unfinished batch is dropped, and finished items stay."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class JsonLines(logging.Formatter):
    """One JSON object on each line: time, level, message, and the record's `facts` if there are any."""

    def format(self, record: logging.LogRecord) -> str:
        """See the class."""
        body = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        return json.dumps(body | getattr(record, "facts", {}))


def log_to_standard_error(as_json: bool) -> None:
    """Log messages of level INFO and above to standard error, as text or as JSON lines.

    This replaces the log of ``--verbose`` but keeps its level, so that -vv also shows debug messages.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level, ours = min(logging.INFO, logging.getLogger().level), verbosity.get() >= VERBOSE
    logging.basicConfig(level=level, handlers=[handler], force=ours)
