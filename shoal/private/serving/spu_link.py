"""How a party starts its SPU process: versions that must agree, SPU's connection, and the start order."""

from __future__ import annotations

import importlib.util
import os
import secrets
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from shoal.errors import ShoalError
from shoal.private.program.artifact import Artifact
from shoal.private.protocol.pool import PLAN_VERSION
from shoal.private.serving.links import LINK_SECONDS, Expected, Links
from shoal.private.serving.options import PRODUCTS
from shoal.private.serving.session import Session, TimedOutError, printable, whole
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import Channel, connect_again

SERVER, CLIENT = 0, 1
SETUP_SECONDS = 300.0
"""Seconds that an SPU process may take to connect, make keys and compile."""
BACKGROUND = 10
"""What is added to the niceness of SPU processes that make items, so that queries come first."""


@dataclass(frozen=True)
class Local:
    """What is the same in all sessions of a party. `nice` is added to the niceness of SPU processes that make items.

    `workers` and `cache_bytes` are those of SEAL's products. At a server, `links` are the second connections that its
    sessions wait for.
    """

    artifact: Artifact
    terms: dict[str, Any]
    tls: TLS | None
    timeout_s: float
    threads: int
    max_batch: int = 32
    products: str = PRODUCTS[0]
    nice: int = 0
    workers: str = "1"
    cache_bytes: int = 0
    links: Links = field(default_factory=Links)


def require_spu() -> dict[str, str]:
    """Versions of SPU and JAX, which must be equal at both parties. Raises ShoalError if they are not installed."""
    if importlib.util.find_spec("spu") is None or importlib.util.find_spec("jax") is None:
        raise ShoalError(
            "found no SPU in this Python; need Python 3.10 or 3.11 with the private extra; "
            "do pip install shoal[private]"
        )
    return {"spu": metadata.version("spu"), "jax": metadata.version("jax")}


def terms_of(half: Artifact) -> dict[str, Any]:
    """What must be equal at both parties. Raises ShoalError if SPU is not installed."""
    return half.terms | require_spu() | {"items": PLAN_VERSION}


def spu_threads(asked: int | None) -> int:
    """Threads for SPU. Each may open an OT instance, so more than 8 would cost memory and setup for little."""
    return max(1, min(8, asked or os.cpu_count() or 1))


def link_as_server(session: Session, local: Local, hello: dict[str, Any], batch: int) -> None:
    """Welcome a client whose terms agree and start the SPU process that serves it. Returns when it is ready."""
    agreed = {
        "session": secrets.token_hex(16),
        "products": local.products,
        "threads": min(whole(hello, "threads", 1024), local.threads),
    }
    with local.links.expect(session.control) as expected:
        session.control.send({"type": "welcome", "terms": local.terms, "link": expected.token} | agreed)
        session.start(_start_order(local, SERVER, agreed, batch))
        link = _second_connection(session, expected)
        link.send({"type": "linked"})
        session.carry(link)
    session.from_worker(SETUP_SECONDS)
    session.control.send({"type": "ready"})


def link_as_client(session: Session, local: Local, welcome: dict[str, Any], batch: int) -> None:
    """Start the SPU process as the server's `welcome` says. Returns when both are ready."""
    name, token, products = (welcome.get(key) for key in ("session", "link", "products"))
    if not (isinstance(name, str) and isinstance(token, str) and products in PRODUCTS):
        raise ShoalError(f"found a malformed answer from {session.control.name}; need a shoal server there")
    agreed = {
        "session": name,
        "products": products,
        "threads": min(whole(welcome, "threads", 1024), local.threads),
    }
    session.start(_start_order(local, CLIENT, agreed, batch))
    session.carry(connect_second(session.control, local.tls, token))
    session.from_worker(SETUP_SECONDS)
    session.from_peer(("ready",), SETUP_SECONDS)


def _second_connection(session: Session, expected: Expected) -> Channel:
    """The second connection of the client of `session`, once it is there."""
    try:
        session.until(lambda: expected.channel is not None, LINK_SECONDS)
    except TimedOutError as error:
        raise TimedOutError(
            f"found no second connection from {session.control.name} within {LINK_SECONDS:g} s; need one to the same "
            "server and port; let firewalls and balancers pass it"
        ) from error
    assert expected.channel is not None
    return expected.channel


def connect_second(control: Channel, tls: TLS | None, token: str) -> Channel:
    """Another connection to the server of `control`, which belongs to the session that the server gave `token`.

    Raises ShoalError when the server does not accept it.
    """
    link = connect_again(control, tls, LINK_SECONDS)
    try:
        link.send({"type": "link", "token": token})
        answer, _ = link.receive()
        if answer["type"] != "linked":
            raise ShoalError(printable(answer.get("message"), 600))
    except ShoalError:
        link.close()
        raise
    return link


def _start_order(local: Local, rank: int, agreed: dict[str, Any], batch: int) -> dict[str, Any]:
    """The first order to the SPU process, with all that it needs to start."""
    terms = local.artifact.terms
    settings = {k: terms[k] for k in ("field_bits", "fraction_bits", "ot_kind")}
    settings |= {k: agreed[k] for k in ("products", "threads")} | {
        "timeout_s": local.timeout_s,
        "link_s": 30.0,
        "workers": local.workers,
        "cache_bytes": local.cache_bytes,
    }
    start = {"folder": str(local.artifact.folder.resolve()), "rank": rank, "batch": batch, "nice": local.nice}
    return start | {"session": agreed["session"], "settings": settings}
