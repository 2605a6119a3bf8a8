"""The answer to a query, and its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Result:
    """The answer to one query, and its cost.

    `taken` is the exit at which each image stopped, `logits` [N, classes] are those of that exit. `exits` holds the
    logits of all exits, in their order; exits after the one taken hold NaN. `seconds` is the whole query as seen by
    the client, `relu_s` and `linear_s` are parts of it. `bytes` and `messages` count both directions, without TLS.
    `latencies` counts one-way latencies in sequence. `memory_bytes` is the peak memory so far of the client's process.

    `made` is the number of items that the query had to make because none was ready. `making_s`, the seconds that this
    took, is not part of `seconds`.
    """

    logits: np.ndarray
    exits: tuple[np.ndarray, ...]
    seconds: float
    bytes: int
    messages: int
    latencies: int
    relu_s: float
    linear_s: float
    memory_bytes: int
    taken: tuple[int, ...]
    made: int = 0
    making_s: float = 0.0


def combined(rows: list[dict[str, Any]], seconds: float, made: int, making_s: float) -> Result:
    """Combine the figures and exits of several images into one Result."""
    exits = tuple(np.concatenate(parts) for parts in zip(*(row["exits"] for row in rows), strict=True))
    sums = {k: sum(row[k] for row in rows) for k in ("bytes", "messages", "latencies", "relu_s", "linear_s")}
    memory = max(row["memory_bytes"] for row in rows)
    taken = tuple(row["taken"] for row in rows)
    logits = np.stack([exits[k][i] for i, k in enumerate(taken)])
    return Result(logits, exits, seconds, memory_bytes=memory, taken=taken, made=made, making_s=making_s, **sums)
