"""Direct mode: every step of a query runs inside SPU when the query comes. Prepared mode is measured against it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.errors import ShoalError
from shoal.private.serving.session import Session, whole
from shoal.private.serving.spu_link import Local, link_as_client, link_as_server

Answered = Callable[[float, int, int], None]
"""Called by the server for each answered query with its seconds, and the bytes it sent and received for it."""


@dataclass(frozen=True)
class Result:
    """The answer to one query, and its cost.

    `taken` is the exit at which each image stopped, `logits` [N, classes] are those of that exit. `exits` holds the
    logits of all exits, in their order; exits after the one taken hold NaN. `seconds` is the whole query as seen by
    the client, `relu_s` and `linear_s` are parts of it. `bytes` and `messages` count both directions, without TLS and
    the framing of SPU's connection. `latencies` counts one-way latencies in sequence (0 in direct mode, where it
    is not known). `memory_bytes` is the peak memory so far of the client's process that computes.
    """

    logits: np.ndarray
    exits: tuple[np.ndarray, ...]
    seconds: float
    mode: str
    bytes: int
    messages: int
    latencies: int
    relu_s: float
    linear_s: float
    memory_bytes: int
    taken: tuple[int, ...]


def combined(rows: list[dict[str, Any]], seconds: float, mode: str) -> Result:
    """Combine the figures and exits of several batches into one Result."""
    exits = tuple(np.concatenate(parts) for parts in zip(*(row["exits"] for row in rows), strict=True))
    sums = {k: sum(row[k] for row in rows) for k in ("bytes", "messages", "latencies", "relu_s", "linear_s")}
    memory = max(row["memory_bytes"] for row in rows)
    taken = tuple(row.get("taken", len(exits) - 1) for row in rows for _ in row["exits"][0])
    logits = np.stack([exits[k][i] for i, k in enumerate(taken)])
    return Result(logits, exits, seconds, mode, memory_bytes=memory, taken=taken, **sums)


def serve_direct(session: Session, local: Local, hello: dict[str, Any], answered: Answered) -> None:
    """Serve one session of direct queries, until it ends."""
    batch = whole(hello, "batch", local.max_batch)
    link_as_server(session, local, hello, "direct", batch)
    while (message := session.next_order(("query", "bye"), local.timeout_s))["type"] == "query":
        started = time.perf_counter()
        batch = whole(message, "batch", local.max_batch)
        session.order({"type": "query", "batch": batch})
        session.control.send({"type": "go"})
        # Where SPU waits for the peer, its own time-out comes first. A long computation may take several times as long.
        done, _ = session.from_worker(10 * local.timeout_s)
        session.control.send({"type": "done", "memory": done["memory"]})
        answered(time.perf_counter() - started, done["sent"], done["received"])


class DirectQueries:
    """The client's side of a session of direct queries."""

    def __init__(self, session: Session, local: Local, batch: int) -> None:
        self.session, self.local, self.batch = session, local, batch
        self.max_batch, self.server_memory_bytes = 0, 0
        self.setup: dict[str, float] = {}

    def hello(self) -> dict[str, Any]:
        """What the server needs to know to start its SPU process."""
        return {"task": "direct", "batch": self.batch, "threads": self.local.threads}

    def open(self, welcome: dict[str, Any]) -> None:
        """Make keys, pass weights, compile, and warm up with a small product and ReLU."""
        self.max_batch = whole(welcome, "max_batch", 1 << 20)
        ready = link_as_client(self.session, self.local, welcome, "direct", self.batch)
        self.setup = {k: v for k, v in ready.items() if k.endswith("_s")}

    def query(self, images: np.ndarray, exit_above: float | None = None) -> dict[str, Any]:
        """Figures and logits of one batch of encoded float32 images. Raises ShoalError for `exit_above`."""
        if exit_above is not None:
            raise ShoalError("found exit_above in direct mode; need prepared mode for early exits; leave it out")
        self.session.control.send({"type": "query", "batch": len(images)})
        self.session.from_peer(("go",), self.local.timeout_s)
        self.session.order({"type": "query", "batch": len(images)}, images.tobytes())
        done, payload = self.session.from_worker(10 * self.local.timeout_s)
        memory = self.session.from_peer(("done",), self.local.timeout_s).get("memory")
        self.server_memory_bytes = memory if isinstance(memory, int) else 0
        figures = {k: done[k] for k in ("messages", "relu_s", "linear_s")} | {"latencies": 0}
        figures |= {"bytes": done["sent"] + done["received"], "memory_bytes": done["memory"]}
        return figures | {"exits": _exits(done["shapes"], payload)}


def _exits(shapes: list[list[int]], payload: bytes) -> tuple[np.ndarray, ...]:
    exits, offset = [], 0
    for shape in shapes:
        count = int(np.prod(shape))
        exits.append(np.frombuffer(payload, np.float64, count, offset).reshape(shape))
        offset += 8 * count
    return tuple(exits)
