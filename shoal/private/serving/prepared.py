"""Items at both parties: sessions that make correlated randomness, and sessions of queries that spend it.

An item has the same name at both parties, and is ready once both have staged it. For a query both parties claim one
item, which deletes it from disk before anything that depends on it is sent. After a query, both read the item of the
next one, whose name the client has sent. If the client asks for it, they claim it, too.
"""

from __future__ import annotations

import contextlib
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
from shoal.private.protocol.randomness import Half
from shoal.private.protocol.signs import Side
from shoal.private.serving.ahead import Ahead, Background
from shoal.private.serving.limits import Place
from shoal.private.serving.options import MOST_ITEMS
from shoal.private.serving.refill import Proceed
from shoal.private.serving.room import Room
from shoal.private.serving.session import PeerError, Session, whole
from shoal.private.serving.spu_link import Local, link_as_server
from shoal.private.transport.wire import SocketWire

MAX_LIST = 1 << 18
"""Most bytes of a list of names in a message."""
Progress = Callable[[int, int], None]
"""Called with (items made, items asked)."""
Answered = Callable[[float, int, int], None]
"""Called by the server for each answered query with its seconds, and the bytes it sent and received for it."""
Made = Callable[[int, int, int], None]
"""Called by the server for each finished batch with (items, bytes that SPU sent, bytes that SPU received)."""


@dataclass
class Offline:
    """The cost of making items: for each batch, its number of items and the figures of its SPU process.

    Kinds of products are "product" (linear layers), "and" (bits) and "chosen" (bits times words).
    """

    batches: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    @property
    def items(self) -> int:
        """The number of items made."""
        return sum(items for items, _ in self.batches)

    @property
    def later(self) -> Offline:
        """The cost without the first batch, in which SPU also makes its keys."""
        return Offline(self.batches[1:])

    @property
    def kinds(self) -> dict[str, dict[str, float]]:
        """For each kind of product, its seconds, bytes both ways and messages in all batches."""
        return _sums(facts["kinds"] for _, facts in self.batches)

    @property
    def steps(self) -> dict[str, float]:
        """Seconds of each linear layer's product in all batches."""
        return _sums({"seconds": facts["steps"]} for _, facts in self.batches)["seconds"]


def _sums(tables: Iterable[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    total: dict[str, dict[str, float]] = {}
    for table in tables:
        for key, row in table.items():
            mine = total.setdefault(key, dict.fromkeys(row, 0.0))
            mine |= {name: mine[name] + value for name, value in row.items()}
    return total


def names_of(payload: bytes) -> list[str]:
    """The names of items in a peer's message. Raises PeerError for too many."""
    names = payload.decode("ascii", "replace").split()
    if len(names) > MOST_ITEMS:
        raise PeerError(f"found {len(names)} names of prepared items; need at most {MOST_ITEMS}; prepare fewer")
    return names


def payload_of(names: list[str]) -> bytes:
    """Names of items as bytes for a message."""
    return " ".join(names[:MOST_ITEMS]).encode()


# ---------------------------------------------------------------- making


def serve_preparation(
    session: Session, local: Local, hello: dict[str, Any], pool: Pool, allowance: Allowance, made: Made
) -> None:
    """Serve one session of preparation, until it ends."""
    batch = whole(hello, "batch", local.max_batch)
    begun = False
    with allowance.for_items(pool, 1):
        pass  # a client without room must not start an SPU process
    with allowance.room.for_batch(pool.layout, batch), pool.making() as expect:
        link_as_server(session, local, hello, batch)
        while (message := session.next_order(("make", "bye"), local.timeout_s))["type"] == "make":
            names = message.get("names")
            if not isinstance(names, list) or not 1 <= len(names) <= batch:
                raise PeerError(f"found a request for other than 1 to {batch} items; need a shoal client there")
            if begun and allowance.place.over():
                session.control.send({"type": "turn"})
                return
            with allowance.for_items(pool, len(names)):
                expect(names)
                session.control.send({"type": "go"})
                facts = _make(session, local, pool, names)
            begun = True
            made(len(names), facts["sent"], facts["received"])


@dataclass(frozen=True)
class Allowance:
    """What one session of preparation may take of the server: its turn at an SPU process, and room."""

    place: Place
    room: Room

    def for_items(self, pool: Pool, count: int) -> contextlib.AbstractContextManager[None]:
        """Disk for `count` more items of this client. Raises RefusedError where there is none."""
        return self.room.for_items(pool, self.place.identity, count)


@dataclass(frozen=True)
class Request:
    """What a client asks for: `count` items, `batch` at a time.

    `progress` hears of each finished batch; `proceed` is asked between two batches and may end the request early.
    """

    count: int
    batch: int
    progress: Progress | None = None
    proceed: Proceed | None = None

    def rest(self, made: int) -> Request:
        """The same request without the items that are made."""
        progress = self.progress
        told = None if progress is None else lambda done, _: progress(made + done, self.count)
        return Request(self.count - made, self.batch, told, self.proceed)


def prepare(session: Session, local: Local, pool: Pool, request: Request) -> Offline:
    """The client's side: makes the items once both SPU processes are connected; finished items stay.

    Makes fewer when the server ends this client's turn, because others wait.
    """
    made, cost = 0, Offline()
    with pool.making() as expect:
        while made < request.count and (not made or request.proceed is None or request.proceed()):
            base, size = secrets.token_hex(16), min(request.batch, request.count - made)
            names = [f"{base}-{i:06d}" for i in range(size)]
            expect(names)
            session.control.send({"type": "make", "names": names})
            if session.from_peer(("go", "turn"), local.timeout_s)["type"] == "turn":
                break
            cost.batches.append((size, _make(session, local, pool, names)))
            made += size
            if request.progress is not None:
                request.progress(made, request.count)
    return cost


def _make(session: Session, local: Local, pool: Pool, names: list[str]) -> dict[str, Any]:
    """Let the SPU process make and stage items, and commit them once the peer has staged them, too.

    The server commits first, so every item that is ready at the client is ready at the server.
    """
    session.order({"type": "make", "names": names, "pool": str(pool.folder.resolve())})
    facts, _ = session.from_worker(10 * local.timeout_s)
    if pool.client:
        session.control.send({"type": "staged"})
    session.from_peer(("staged",), 10 * local.timeout_s)
    pool.commit(names)
    if not pool.client:
        session.control.send({"type": "staged"})
    return facts


# ---------------------------------------------------------------- spending


@dataclass(frozen=True)
class Rules:
    """How a server answers one client's queries. `spend` counts one, and raises RefusedError beyond the budget.

    `answered` hears of each answer. `early_exit` says whether clients may stop an inference at an early exit, which
    the server then learns.
    """

    spend: Callable[[], None]
    answered: Answered
    early_exit: bool


def serve_queries(session: Session, local: Local, prepared: Prepared, pool: Pool, rules: Rules) -> None:
    """Serve one session of prepared queries, until it ends. `session.payload` holds the client's list of items."""
    theirs = names_of(session.payload)
    mine = pool.everything()
    session.control.send({"type": "welcome", "terms": local.terms}, payload_of(mine))
    agreed, ahead = set(pool.agree(theirs)), Ahead(pool)
    if first := next((name for name in theirs if name in agreed), None):
        ahead.fetch(first, claim=False)
    while (message := session.next_order(("infer", "bye"), local.timeout_s))["type"] == "infer":
        started, early = time.perf_counter(), message.get("early") is True
        if early and not rules.early_exit:
            raise PeerError("found a query with early exit; need a server that allows it (--early-exit)")
        name = message.get("name")
        rules.spend()
        half = ahead.take(name)
        session.control.send({"type": "go"})
        wire = SocketWire(session.control, local.timeout_s)
        Inference(prepared, Side(False, wire, half, str(name))).run(None, early)
        rules.answered(time.perf_counter() - started, wire.traffic.sent, wire.traffic.received)
        if message.get("next") is not None:
            ahead.fetch(message["next"], claim=message.get("claim") is True)


class PreparedQueries:
    """The client's side of a session of prepared queries. Each query takes one image and spends one item."""

    def __init__(self, session: Session, local: Local, pool: Pool, claim_ahead: bool = False) -> None:
        self.session, self.local, self.pool, self.claim_ahead = session, local, pool, claim_ahead
        self.prepared = Prepared(pool.layout, None)
        self.next = Background(pool)
        if first := self.next.next_name():
            self.next.start(first, claim=False)  # the server does not hear of it yet

    @property
    def ready(self) -> int:
        """Items for queries to come: those on disk, and one that is claimed ahead."""
        return len(self.pool.names()) + self.next.ahead.claimed

    def release(self) -> None:
        """Forget the item that was read ahead; one that was claimed ahead is lost."""
        self.next.end()

    def query(self, images: np.ndarray, exit_above: float | None = None) -> dict[str, Any]:
        """Figures and logits of one image, int64 [1, *shape]. See `Client.query` for `exit_above`."""
        self.session.check()  # a session that the server has ended must not cost an item
        self.next.wait()
        name = self.next.next_name()
        if name is None:
            raise ShoalError("found no prepared item left; need one for each image; run shoal prepare")
        after = self.next.next_name(besides=name)
        half = self._claim(name, after, exit_above is not None)
        figures = self._infer(name, half, images, exit_above)
        if after is not None:
            self.next.start(after, self.claim_ahead)
        return figures

    def _claim(self, name: str, after: str | None, early: bool) -> Half:
        """Ask for an inference with this item, and claim it; `after` is the item of the next one."""
        request = {"type": "infer", "name": name, "early": early, "next": after, "claim": self.claim_ahead}
        # The request contains only names, so both parties may claim the item at the same time.
        with self.pool.asking(name):
            if after is not None and self.claim_ahead:
                self.next.ask(after)
            self.session.control.send(request)
            half = self.next.ahead.take(name)
            self.session.from_peer(("go",), self.local.timeout_s)
        return half

    def _infer(self, name: str, half: Half, images: np.ndarray, exit_above: float | None) -> dict[str, Any]:
        wire = SocketWire(self.session.control, self.local.timeout_s)
        run = Inference(self.prepared, Side(True, wire, half, name))
        logits = run.run(torch.from_numpy(images), self._unsure(exit_above))
        traffic, fixed = wire.traffic, self.prepared.fixed
        figures: dict[str, Any] = {"bytes": traffic.sent + traffic.received, "messages": traffic.messages}
        figures |= {"latencies": traffic.latencies, "relu_s": run.relu_s, "linear_s": run.linear_s}
        figures["memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        exits = [fixed.decode(y.numpy()) for y in logits]
        absent = [
            np.full((1, *self.pool.layout.shapes[n]), np.nan) for n in self.pool.layout.program.outputs[len(exits) :]
        ]
        return figures | {"exits": (*exits, *absent), "taken": len(exits) - 1}

    def _unsure(self, exit_above: float | None) -> GoOn | bool:
        """A function that says whether an exit's largest softmax probability is below `exit_above`."""

        def go_on(number: int, logits: torch.Tensor) -> bool:
            values = self.prepared.fixed.decode(logits.numpy()).ravel()
            return 1.0 / float(np.exp(values - values.max()).sum()) < float(exit_above or 0)

        return go_on if exit_above is not None else False
