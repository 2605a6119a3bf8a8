"""Shows a server's figures: in a JSON file that is rewritten every few seconds, and to Prometheus on loopback."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from shoal.errors import ShoalError
from shoal.private.monitoring.metrics import exposition
from shoal.storage.files import write_text

LOOPBACK = "127.0.0.1"
LOG = logging.getLogger("shoal.private.serving.server")


class Monitor:
    """Shows the figures of `snapshot` within its `with` block, and writes `file` once more at the end.

    `file` is written as JSON every `every_s` seconds; readers see the old or the new content, never a part of it.
    `port` of 127.0.0.1 answers ``GET /metrics`` (0 takes a free port; `address` says which). Both may be None. Raises
    ShoalError for a port in use and for a file that cannot be written at first; later failures are only logged.
    """

    def __init__(
        self, snapshot: Callable[[], dict[str, Any]], file: Path | None, port: int | None, every_s: float = 5.0
    ) -> None:
        self.snapshot, self.file, self.every_s = snapshot, file, every_s
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._http = None if port is None else _endpoint(snapshot, port)

    @property
    def address(self) -> str | None:
        """``"host:port"`` of the endpoint, None without one."""
        return None if self._http is None else f"{LOOPBACK}:{self._http.server_port}"

    def __enter__(self) -> Monitor:
        try:
            self._write()
        except ShoalError:
            self._close()
            raise
        if self.file is not None:
            self._start(self._rewrite)
        if self._http is not None:
            self._start(self._http.serve_forever)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        if self._http is not None:
            self._http.shutdown()
        for thread in self._threads:
            thread.join()
        self._close()
        self._try_to_write()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _close(self) -> None:
        if self._http is not None:
            self._http.server_close()

    def _rewrite(self) -> None:
        while not self._ended.wait(self.every_s):
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self._write()
        except ShoalError as error:
            LOG.warning("%s", error, extra={"facts": {"event": "failed", "kind": "metrics"}})

    def _write(self) -> None:
        if self.file is not None:
            write_text(self.file, json.dumps(self.snapshot(), indent=1) + "\n")


def _endpoint(snapshot: Callable[[], dict[str, Any]], port: int) -> HTTPServer:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5.0  # seconds for which a silent reader may block the others

        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == "/metrics"
            body = exposition(snapshot()).encode() if found else b"found no such page; need /metrics\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def version_string(self) -> str:
            return "shoal"

        def log_message(self, format: str, *args: object) -> None:
            pass  # one line for each request would drown all others

    try:
        return HTTPServer((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise ShoalError(
            f"found port {port} not free for metrics ({error}); need an unused port of this machine; choose another"
        ) from error
