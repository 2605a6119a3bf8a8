"""How a party starts its SPU process: versions that must agree, SPU's own connection, and the start order."""

from __future__ import annotations

import importlib.util
import os
import secrets
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.private.program.artifact import Artifact
from shoal.private.serving.options import PRODUCTS
from shoal.private.serving.session import Session, whole
from shoal.private.transport.certs import TLS
from shoal.private.transport.channel import Channel, free_port, is_loopback, parse_address

SERVER, CLIENT = 0, 1
SETUP_SECONDS = 300.0
"""Seconds that an SPU process may take to connect, make keys and compile."""
BACKGROUND = 10
"""What is added to the niceness of SPU processes that make items, so that queries come first."""


@dataclass(frozen=True)
class Local:
    """What is the same in all sessions of a party. `link` is its address for SPU's connection; None takes a free port.

    `nice` is added to the niceness of SPU processes that make items.
    """

    artifact: Artifact
    terms: dict[str, Any]
    tls: TLS | None
    timeout_s: float
    threads: int
    link: str | None
    max_batch: int = 128
    shared_weights: bool = False
    products: str = PRODUCTS[0]
    nice: int = 0


def require_spu() -> dict[str, str]:
    """Versions of SPU and JAX, which must be equal at both parties. Raises ShoalError if they are not installed."""
    if importlib.util.find_spec("spu") is None or importlib.util.find_spec("jax") is None:
        raise ShoalError(
            "found no SPU in this Python; need Python 3.10 or 3.11 with the private extra; "
            "do pip install shoal[private]"
        )
    return {"spu": metadata.version("spu"), "jax": metadata.version("jax")}


def spu_threads(asked: int | None) -> int:
    """Threads for SPU. Each may open an OT instance, so more than 8 would cost memory and setup for little."""
    return max(1, min(8, asked or os.cpu_count() or 1))


def link_as_server(session: Session, local: Local, hello: dict[str, Any], task: str, batch: int) -> None:
    """Welcome a client whose terms agree and start the SPU process that serves it. Returns when it is ready."""
    host, port = parse_address(hello.get("link"), "the client's link address")
    if local.tls is None and not is_loopback(host):
        raise ShoalError(f"found link address {host} without TLS; need loopback; pass certificates")
    own = session.control.sock.getsockname()[0]
    link_port = parse_address(local.link, "the link")[1] if local.link else free_port(own)
    agreed = {
        "session": secrets.token_hex(16),
        "shared_weights": local.shared_weights,
        "products": local.products,
        "threads": min(whole(hello, "threads", 1024), local.threads),
    }
    welcome = {"type": "welcome", "terms": local.terms, "link_port": link_port, "max_batch": local.max_batch}
    session.control.send(welcome | agreed)
    hosts = (f"{own}:{link_port}", f"{host}:{port}")
    session.start(_start_order(local, SERVER, hosts, agreed, task, batch))
    session.from_worker(SETUP_SECONDS)
    session.control.send({"type": "ready"})


def offer_link(control: Channel, local: Local) -> str:
    """The address at which the client's SPU process will listen."""
    return local.link or f"{hosts_of(control)[0]}:{free_port(hosts_of(control)[0])}"


def link_as_client(
    session: Session, local: Local, welcome: dict[str, Any], link: str, task: str, batch: int
) -> dict[str, Any]:
    """Start the SPU process as the server's `welcome` says. Returns its first message when both are ready."""
    _, port = parse_address(link, "client_address")
    name, shared, products = (welcome.get(key) for key in ("session", "shared_weights", "products"))
    if not isinstance(name, str) or not isinstance(shared, bool) or products not in PRODUCTS:
        raise ShoalError(f"found a malformed answer from {session.control.name}; need a shoal server there")
    agreed = {
        "session": name,
        "shared_weights": shared,
        "products": products,
        "threads": min(whole(welcome, "threads", 1024), local.threads),
    }
    bind = f"0.0.0.0:{port}" if local.link else link
    hosts = (f"{hosts_of(session.control)[1]}:{whole(welcome, 'link_port', 65535)}", bind)
    session.start(_start_order(local, CLIENT, hosts, agreed, task, batch))
    ready, _ = session.from_worker(SETUP_SECONDS)
    session.from_peer(("ready",), SETUP_SECONDS)
    return ready


def hosts_of(control: Channel) -> tuple[str, str]:
    """This side's and the other side's host. Raises ShoalError when a server that refuses us has closed already."""
    try:
        return control.sock.getsockname()[0], control.sock.getpeername()[0]
    except OSError as error:
        raise ShoalError(
            f"found that {control.name} is gone after the TLS handshake; need a certificate signed by its authority"
        ) from error


def _start_order(
    local: Local, rank: int, hosts: tuple[str, str], agreed: dict[str, Any], task: str, batch: int
) -> dict[str, Any]:
    """The first order to the SPU process, with all that it needs to start."""
    terms = local.artifact.terms
    settings = {k: terms[k] for k in ("field_bits", "fraction_bits", "ot_kind")}
    settings |= {k: agreed[k] for k in ("shared_weights", "products", "threads")} | {
        "timeout_s": local.timeout_s,
        "link_s": 30.0,
    }
    files = None if local.tls is None else {k: str(Path(v).resolve()) for k, v in asdict(local.tls).items()}
    start = {"folder": str(local.artifact.folder.resolve()), "rank": rank, "hosts": hosts, "task": task}
    start["nice"] = local.nice
    return start | {"session": agreed["session"], "settings": settings, "batch": batch, "tls": files}
