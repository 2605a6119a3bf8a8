"""A server's counters for its operator. They show no images, weights, seeds or items, and clients only as hashes."""

from __future__ import annotations

import hashlib
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper limits, in seconds, of the buckets of a query's histogram; one more bucket holds the rest."""
SESSIONS, REFUSALS, FAILURES = "sessions", "refusals", "failures"


def short_name(client: str) -> str:
    """A client's name in logs and metrics: 8 hex digits of a hash of its certificate and its pool's name."""
    return hashlib.sha256(client.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Level:
    """How full one client's pool is: its ready items, and the bytes of the whole pool on disk."""

    items: int
    bytes: int


@dataclass
class Histogram:
    """Seconds of queries: how many fell in each bucket, and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    sum: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one query."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    def body(self) -> dict[str, Any]:
        """Count, sum, and the queries up to each bucket's limit, as Prometheus counts them."""
        upto = {str(end): sum(self.counts[: i + 1]) for i, end in enumerate(BUCKETS)}
        return {"count": sum(self.counts), "sum": self.sum, "upto": upto}


class Metrics:
    """Counters of one server; any thread may count and read. `levels` returns how full each pool is, by short name."""

    def __init__(self, levels: Callable[[], dict[str, Level]]) -> None:
        self.levels = levels
        self._guard, self._begun = threading.Lock(), time.monotonic()
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in (SESSIONS, REFUSALS, FAILURES)}
        self._bytes: dict[str, Counter[str]] = {}
        self._seconds = Histogram()
        self._open = self._made = self._queries = 0

    def count(self, name: str, kind: str) -> None:
        """Count one more of `name`: a session by task, a refusal by reason, or a failure by kind."""
        with self._guard:
            self._counts[name][kind] += 1

    def connected(self, change: int) -> None:
        """Count a connection that opened (1) or closed (-1)."""
        with self._guard:
            self._open += change

    def answered(self, seconds: float, sent: int, received: int) -> None:
        """Count a query answered in full, its seconds and bytes."""
        with self._guard:
            self._queries += 1
            self._seconds.add(seconds)
            self._traffic("query", sent, received)

    def made(self, items: int, sent: int, received: int) -> None:
        """Count a batch of prepared items that is ready at both parties, and its bytes."""
        with self._guard:
            self._made += items
            self._traffic("prepare", sent, received)

    def _traffic(self, task: str, sent: int, received: int) -> None:
        self._bytes.setdefault(task, Counter()).update({"sent": sent, "received": received})

    def snapshot(self) -> dict[str, Any]:
        """All figures as plain values for JSON, in seconds and bytes; counters start with the server."""
        levels = self.levels()
        with self._guard:
            body: dict[str, Any] = {"uptime_s": time.monotonic() - self._begun, "sessions_open": self._open}
            body |= {name: dict(counts) for name, counts in self._counts.items()}
            body |= {"queries": self._queries, "query_seconds": self._seconds.body()}
            body |= {"items_made": self._made, "bytes": {task: dict(both) for task, both in self._bytes.items()}}
        pools = {client: {"items": level.items, "bytes": level.bytes} for client, level in sorted(levels.items())}
        return body | {"pools": pools, "disk_bytes": sum(level.bytes for level in levels.values())}


def exposition(body: dict[str, Any]) -> str:
    """A snapshot in Prometheus' text format."""
    lines: list[str] = []

    def family(name: str, kind: str, help_: str, samples: dict[str, float]) -> None:
        lines.extend([f"# HELP shoal_{name} {help_}", f"# TYPE shoal_{name} {kind}"])
        lines.extend(f"shoal_{name}{labels} {value}" for labels, value in samples.items())

    family("uptime_seconds", "gauge", "Seconds since the server began.", {"": body["uptime_s"]})
    family("sessions_open", "gauge", "Connections open now.", {"": body["sessions_open"]})
    for name, label, help_ in (
        (SESSIONS, "task", "Sessions that began, by task."),
        (REFUSALS, "reason", "Sessions or batches refused for want of room."),
        (FAILURES, "kind", "Sessions that failed."),
    ):
        family(f"{name}_total", "counter", help_, {f'{{{label}="{k}"}}': v for k, v in body[name].items()})
    family("queries_total", "counter", "Queries answered in full.", {"": body["queries"]})
    family("items_made_total", "counter", "Prepared items made.", {"": body["items_made"]})
    traffic = {f'{{task="{t}",direction="{d}"}}': v for t, both in body["bytes"].items() for d, v in both.items()}
    family("bytes_total", "counter", "Bytes of queries and preparation, as this server sees them.", traffic)
    family("query_seconds", "histogram", "Seconds of answered queries.", {})
    lines.extend(_histogram(body["query_seconds"]))
    pools = body["pools"].items()
    family("pool_items", "gauge", "Items ready, by client.", {f'{{client="{c}"}}': p["items"] for c, p in pools})
    family("pool_bytes", "gauge", "Bytes on disk, by client.", {f'{{client="{c}"}}': p["bytes"] for c, p in pools})
    return "\n".join(lines) + "\n"


def _histogram(body: dict[str, Any]) -> list[str]:
    ends = body["upto"] | {"+Inf": body["count"]}
    lines = [f'shoal_query_seconds_bucket{{le="{end}"}} {count}' for end, count in ends.items()]
    return [*lines, *(f"shoal_query_seconds_{k} {body[k]}" for k in ("sum", "count"))]
