"""Prepared mode: both sides' sessions that make correlated randomness ahead, and those that spend it on queries.

Names of items are common to both parties. An item counts once both have staged it; a query claims one at either side,
which destroys it, before anything that depends on it is sent.
"""

from __future__ import annotations

import resource
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shoal.errors import ShoalError
from shoal.private.protocol.online import GoOn, Inference, Prepared
from shoal.private.protocol.pool import Pool
from shoal.private.protocol.signs import Side
from shoal.private.serving.direct import Answered
from shoal.private.serving.line import Line, RefusedError, whole
from shoal.private.serving.refill import Proceed
from shoal.private.serving.spu_link import Local, link_as_client, link_as_server
from shoal.private.transport.wire import SocketWire

MOST_NAMES, MAX_LIST = 4096, 1 << 18
Progress = Callable[[int, int], None]
"""Called with (items made, items asked)."""
Made = Callable[[int, int, int], None]
"""Called by the server for each finished batch with its items, and the bytes that SPU sent and received for it."""


@dataclass
class Offline:
    """What making items cost: of each batch its number of items and what its SPU process said.

    Kinds of products are "product" (linear layers), "and" (bits) and "chosen" (bits times words).
    """

    batches: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    @property
    def items(self) -> int:
        """Items made."""
        return sum(items for items, _ in self.batches)

    @property
    def later(self) -> Offline:
        """All but the first batch, in which SPU also makes its keys."""
        return Offline(self.batches[1:])

    @property
    def kinds(self) -> dict[str, dict[str, float]]:
        """Of each kind of product its seconds, bytes both ways and messages, over all batches."""
        return _sums(facts["kinds"] for _, facts in self.batches)

    @property
    def steps(self) -> dict[str, float]:
        """Seconds of each linear layer's product, over all batches."""
        return _sums({"seconds": facts["steps"]} for _, facts in self.batches)["seconds"]


def _sums(tables: Iterable[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    total: dict[str, dict[str, float]] = {}
    for table in tables:
        for key, row in table.items():
            mine = total.setdefault(key, dict.fromkeys(row, 0.0))
            mine |= {name: mine[name] + value for name, value in row.items()}
    return total


def names_of(payload: bytes) -> list[str]:
    """Names of items as a peer sent them; ShoalError for too many."""
    names = payload.decode("ascii", "replace").split()
    if len(names) > MOST_NAMES:
        raise ShoalError(f"found {len(names)} names of prepared items; need at most {MOST_NAMES}; prepare fewer")
    return names


def payload_of(names: list[str]) -> bytes:
    """Names of items for a message."""
    return " ".join(names[:MOST_NAMES]).encode()


# ---------------------------------------------------------------- making


def serve_preparation(line: Line, local: Local, hello: dict[str, Any], pool: Pool, most_bytes: int, made: Made) -> None:
    """The server's side of one session that makes items, to its end."""
    batch = whole(hello, "batch", local.max_batch)
    # More names than fit a message could not be agreed on.
    room = min(most_bytes // max(1, pool.plan.stored_bytes(False)), MOST_NAMES)
    _require_room(pool, 1, room)
    link_as_server(line, local, hello, "prepare", batch)
    with pool.making() as expect:
        while (message := line.next_order(("make", "bye"), local.timeout_s))["type"] == "make":
            names = message.get("names")
            if not isinstance(names, list) or not 1 <= len(names) <= batch:
                raise ShoalError(f"found a request for other than 1 to {batch} items; need a shoal client there")
            _require_room(pool, len(names), room)
            expect(names)
            line.control.send({"type": "go"})
            facts = _make(line, local, pool, names)
            made(len(names), facts["sent"], facts["received"])


def _require_room(pool: Pool, more: int, room: int) -> None:
    # Staged items are on disk, too, whether a crash left them or a client that went before they were committed.
    have = len(pool.everything())
    if have + more > room:
        raise RefusedError(
            f"found {have} prepared items of at most {room}; need room for {more} more; query first", "room"
        )


def prepare(
    line: Line,
    local: Local,
    welcome: dict[str, Any],
    link: str,
    pool: Pool,
    count: int,
    batch: int,
    progress: Progress | None,
    proceed: Proceed | None = None,
) -> Offline:
    """The client's side: makes `count` items in batches, asking `proceed` between two; what is finished stays."""
    link_as_client(line, local, welcome, link, "prepare", batch)
    made, cost = 0, Offline()
    with pool.making() as expect:
        while made < count and (not made or proceed is None or proceed()):
            base, size = secrets.token_hex(16), min(batch, count - made)
            names = [f"{base}-{i:06d}" for i in range(size)]
            expect(names)
            line.control.send({"type": "make", "names": names})
            line.from_peer(("go",), local.timeout_s)
            cost.batches.append((size, _make(line, local, pool, names)))
            made += size
            if progress is not None:
                progress(made, count)
    return cost


def _make(line: Line, local: Local, pool: Pool, names: list[str]) -> dict[str, Any]:
    """Have the SPU process make and stage items, and commit them when the peer has staged them, too.

    The server commits first: an item that the client sees is there at the server, even for a query at that moment.
    """
    line.order({"type": "make", "names": names, "pool": str(pool.folder.resolve())})
    facts, _ = line.from_worker(10 * local.timeout_s)
    if pool.client:
        line.control.send({"type": "staged"})
    line.from_peer(("staged",), 10 * local.timeout_s)
    pool.commit(names)
    if not pool.client:
        line.control.send({"type": "staged"})
    return facts


# ---------------------------------------------------------------- spending


def serve_queries(
    line: Line, local: Local, prepared: Prepared, pool: Pool, answered: Answered, early_exit: bool
) -> None:
    """The server's side of one session of prepared queries, to its end. The client's list of items is in `line`.

    `early_exit` says whether clients may end an inference at an exit, which the server then learns.
    """
    theirs = names_of(line.payload)
    mine = pool.everything()
    line.control.send({"type": "welcome", "terms": local.terms}, payload_of(mine))
    pool.agree(theirs)
    while (message := line.next_order(("infer", "bye"), local.timeout_s))["type"] == "infer":
        started, early = time.perf_counter(), message.get("early") is True
        if early and not early_exit:
            raise ShoalError("found a query with early exit; need a server that allows it (--early-exit)")
        half = pool.claim(message.get("name"))
        line.control.send({"type": "go"})
        wire = SocketWire(line.control, local.timeout_s)
        Inference(prepared, Side(False, wire, half)).run(None, early)
        answered(time.perf_counter() - started, wire.traffic.sent, wire.traffic.received)


class PreparedSession:
    """The client's side of one session of prepared queries. It takes images one at a time, an item each."""

    max_batch = 1

    def __init__(self, line: Line, local: Local, pool: Pool) -> None:
        self.line, self.local, self.pool = line, local, pool
        self.prepared = Prepared(pool.plan, None)

    def query(self, images: np.ndarray, exit_above: float | None = None) -> dict[str, Any]:
        """The figures and logits of one image, int64 [1, *shape]; it ends at an exit as sure as `exit_above`."""
        self.line.check()  # a session that the server ended should not cost an item
        names = self.pool.names()
        if not names:
            raise ShoalError("found no prepared item left; need one for each image; run shoal prepare")
        # The request says nothing but the item's name, so both sides claim it at the same time.
        with self.pool.asking(names[0]):
            self.line.control.send({"type": "infer", "name": names[0], "early": exit_above is not None})
            half = self.pool.claim(names[0])
            self.line.from_peer(("go",), self.local.timeout_s)
        wire = SocketWire(self.line.control, self.local.timeout_s)
        run = Inference(self.prepared, Side(True, wire, half))
        logits = run.run(torch.from_numpy(images), self._unsure(exit_above))
        traffic, fixed = wire.traffic, self.prepared.fixed
        figures: dict[str, Any] = {"bytes": traffic.sent + traffic.received, "messages": traffic.messages}
        figures |= {"latencies": traffic.latencies, "relu_s": run.relu_s, "linear_s": run.linear_s}
        figures["memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        exits = [fixed.decode(y.numpy()) for y in logits]
        absent = [np.full((1, *self.pool.plan.shapes[n]), np.nan) for n in self.pool.plan.program.outputs[len(exits) :]]
        return figures | {"exits": (*exits, *absent), "taken": len(exits) - 1}

    def _unsure(self, exit_above: float | None) -> GoOn | bool:
        """Whether an exit's largest softmax probability stays below `exit_above`."""

        def go_on(number: int, logits: torch.Tensor) -> bool:
            values = self.prepared.fixed.decode(logits.numpy()).ravel()
            return 1.0 / float(np.exp(values - values.max()).sum()) < float(exit_above or 0)

        return go_on if exit_above is not None else False
