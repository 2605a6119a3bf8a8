"""Direct mode: every step of a query inside SPU, on demand. The yardstick for the prepared mode."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.errors import ShoalError
from shoal.private.serving.line import Line, whole
from shoal.private.serving.spu_link import Local, link_as_client, link_as_server, offer_link

Answered = Callable[[float, int, int], None]
"""Called by the server for each answered query with its seconds, and the bytes it sent and received for it."""


@dataclass(frozen=True)
class Result:
    """What one query gave: logits [N, classes] of the last exit, all `exits` weak to strong, and its cost.

    `seconds` is the whole query as the client waits for it; `relu_s` and `linear_s` are its parts. `bytes` and
    `messages` count both directions, without framing of SPU's link and TLS. `latencies` are one-way waits in sequence
    (0: not known, in direct mode). `memory_bytes` is the peak of the client's process that computed, so far. `taken`
    is the exit that each image left at; `logits` are that exit's, and the exits after it hold NaN.
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
    """One Result of several batches' figures and exits."""
    exits = tuple(np.concatenate(parts) for parts in zip(*(row["exits"] for row in rows), strict=True))
    sums = {k: sum(row[k] for row in rows) for k in ("bytes", "messages", "latencies", "relu_s", "linear_s")}
    memory = max(row["memory_bytes"] for row in rows)
    taken = tuple(row.get("taken", len(exits) - 1) for row in rows for _ in row["exits"][0])
    logits = np.stack([exits[k][i] for i, k in enumerate(taken)])
    return Result(logits, exits, seconds, mode, memory_bytes=memory, taken=taken, **sums)


def serve_direct(line: Line, local: Local, hello: dict[str, Any], answered: Answered) -> None:
    """The server's side of one direct session, to its end."""
    batch = whole(hello, "batch", local.max_batch)
    link_as_server(line, local, hello, "direct", batch)
    while (message := line.next_order(("query", "bye"), local.timeout_s))["type"] == "query":
        started = time.perf_counter()
        batch = whole(message, "batch", local.max_batch)
        line.order({"type": "query", "batch": batch})
        line.control.send({"type": "go"})
        # SPU's own limit comes first where it waits for the peer; a long computation may take several of them.
        done, _ = line.from_worker(10 * local.timeout_s)
        line.control.send({"type": "done", "memory": done["memory"]})
        answered(time.perf_counter() - started, done["sent"], done["received"])


class DirectSession:
    """The client's side of one direct session over an agreed line."""

    def __init__(self, line: Line, local: Local, batch: int) -> None:
        self.line, self.local, self.batch = line, local, batch
        self.max_batch, self.server_memory_bytes = 0, 0
        self.setup: dict[str, float] = {}
        self.link = offer_link(line.control, local)

    def hello(self) -> dict[str, Any]:
        """What the server needs to know of this session."""
        return {"task": "direct", "link": self.link, "batch": self.batch, "threads": self.local.threads}

    def open(self, welcome: dict[str, Any]) -> None:
        """Make keys, pass weights, compile and warm up: one small product and ReLU, not a query."""
        self.max_batch = whole(welcome, "max_batch", 1 << 20)
        ready = link_as_client(self.line, self.local, welcome, self.link, "direct", self.batch)
        self.setup = {k: v for k, v in ready.items() if k.endswith("_s")}

    def query(self, images: np.ndarray, exit_above: float | None = None) -> dict[str, Any]:
        """The figures and logits of one batch of encoded float32 images. Raises ShoalError for `exit_above`."""
        if exit_above is not None:
            raise ShoalError("found exit_above in direct mode; need prepared mode for early exits; leave it out")
        self.line.control.send({"type": "query", "batch": len(images)})
        self.line.from_peer(("go",), self.local.timeout_s)
        self.line.order({"type": "query", "batch": len(images)}, images.tobytes())
        done, payload = self.line.from_worker(10 * self.local.timeout_s)
        memory = self.line.from_peer(("done",), self.local.timeout_s).get("memory")
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
