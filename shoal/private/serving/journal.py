"""The events of a server, for its operator: log lines, counters, and the last errors."""

from __future__ import annotations

import logging
import threading

from shoal.private.monitoring.metrics import FAILURES, REFUSALS, SESSIONS, Metrics
from shoal.private.serving.session import (
    EngineError,
    RefusedError,
    Session,
    SessionStoppedError,
    TimedOutError,
    printable,
)
from shoal.private.transport.channel import ClosedError

KINDS: dict[type[Exception], str] = {
    ClosedError: "peer",
    EngineError: "engine",
    SessionStoppedError: "stopped",
    TimedOutError: "timeout",
}


class Journal:
    """The events of one server. Log records carry `facts`, which are fields of JSON logs; clients appear as hashes."""

    def __init__(self, metrics: Metrics, stopped: threading.Event) -> None:
        self.metrics, self.stopped = metrics, stopped
        self.log = logging.getLogger("shoal.private.serving.server")
        self.errors: list[str] = []

    def began(self, task: str) -> None:
        """A session began: both parties' terms agree."""
        self.metrics.count(SESSIONS, task)

    def answered(self, client: str, seconds: float, sent: int, received: int) -> None:
        """A query was answered in full; `sent` and `received` are bytes at this server."""
        self.metrics.answered(seconds, sent, received)
        facts = {"event": "query", "client": client, "seconds": round(seconds, 6)}
        facts |= {"sent": sent, "received": received}
        self.log.info("query of %s: %.3f s", client, seconds, extra={"facts": facts})

    def made(self, client: str, items: int, sent: int, received: int) -> None:
        """A batch of prepared items is ready at both parties."""
        self.metrics.made(items, sent, received)
        facts = {"event": "made", "client": client, "items": items, "sent": sent, "received": received}
        self.log.info("%d items made with %s", items, client, extra={"facts": facts})

    def ended(self, error: Exception, session: Session, agreed: bool) -> None:
        """A session failed or was refused. One that a closing server ends between two queries counts as neither."""
        if isinstance(error, RefusedError):
            self.refused(error.reason, str(error))
        elif not (isinstance(error, SessionStoppedError) and session.idle):
            kind = KINDS.get(type(error), "session" if agreed else "handshake")
            self.failed("stopped" if self.stopped.is_set() else kind, error)

    def refused(self, reason: str, message: str) -> None:
        """A client was refused although it did nothing wrong."""
        self.metrics.count(REFUSALS, reason)
        self._note("refused", reason, message)

    def failed(self, kind: str, error: Exception) -> None:
        """A session failed, or a connection before its session began."""
        self.metrics.count(FAILURES, kind)
        self._note("failed", kind, str(error))

    def _note(self, event: str, kind: str, message: str) -> None:
        message = printable(message, 1000)  # parts of it may come from a peer, to move the cursor or fake a line
        self.log.warning("%s", message, extra={"facts": {"event": event, "kind": kind}})
        self.errors = [*self.errors[-19:], message]
