"""Time prepared queries of an artifact between two processes on this machine, over simulated links."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np

from shoal.costs.links import LINKS, Link
from shoal.costs.model import link_seconds
from shoal.errors import ShoalError
from shoal.measuring.loopback import client_tls, serving
from shoal.measuring.rehearsal import stock
from shoal.measuring.relay import probe, relayed
from shoal.private.program.program import Program, Weights
from shoal.private.protocol.layout import Layout
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions
from shoal.private.serving.result import Result
from shoal.private.transport.certs import make_certificates
from shoal.progress import counter
from shoal.storage.run import Run
from shoal.storage.summary import Summary


class Timed(TypedDict, total=False):
    """Prepared queries over one link: seconds, bytes and messages of a query, and what the relay achieved.

    `online_s` is the median of `samples_s`. `link_s` is the part of it that a link of the rate and round trip that the
    relay achieved takes, by the counts of bytes and latencies. `rest_s` is the rest: the computation of both parties,
    TLS, and the work of the relay. `relay_bytes` includes the handshake and TLS.
    """

    online_s: float
    link_s: float
    rest_s: float
    fastest_s: float
    slowest_s: float
    samples_s: list[float]
    bytes: int
    messages: int
    latencies: int
    achieved: Mapping[str, object]
    relay_bytes: Mapping[str, int]


class Bench(TypedDict):
    """Figures of prepared queries for each link, and the seconds to prepare an item (None in a rehearsal).

    `load` is the machine's load average over the last minute, measured at the end: the mean number of processes that
    used a core or waited for one. `cores` is its number of cores.
    """

    rounds: int
    load: float
    cores: int
    offline_s: float | None
    networks: dict[str, Timed]


@dataclass(frozen=True)
class Request:
    """How `shoal bench` measures."""

    link: tuple[str, ...] = field(default=(), metadata={"cli": ("--link", "--network")})
    """Simulated link: none, lan or wan (repeatable); all three if left out."""
    rounds: int = 5
    """Number of timed queries; the result is their median."""
    batch: int = 1
    """Number of items that are prepared together."""
    rehearse: bool = False
    """Do not prepare items; use random numbers in their place. The times stay the same, but the logits are wrong."""


def bench(artifact: Path, request: Request) -> Bench:
    """Medians of queries of one image over each link, after one query that is not counted.

    Items are made beforehand, without a simulated link. The artifact's own pools are not used. Returns JSON data;
    times are in seconds. Raises ShoalError for an unknown link or fewer than one round, and when the machine is too
    busy for the relay to simulate the link.
    """
    links, rounds = request.link or tuple(LINKS), request.rounds
    unknown = [name for name in links if name not in LINKS]
    if unknown or rounds < 1:
        raise ShoalError(
            f"found links {unknown} and {rounds} rounds; need some of {', '.join(LINKS)}, and 1 round or more"
        )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-")))
        make_certificates(folder / "certs")
        sessions, count = len(links) + (not request.rehearse), len(links) * (rounds + 1)
        if request.rehearse:
            layout = Layout(Program.load(artifact / "client"))
            stock(
                layout,
                (folder / "client", folder / "server"),
                folder / "certs" / "client.pem",
                count,
                Weights.load(artifact / "server").digest(),
            )
        address = stack.enter_context(serving(artifact, folder / "certs", sessions, folder / "server"))
        offline = None if request.rehearse else _prepare(artifact, address, folder, count, request.batch)
        rows = {name: _measure(artifact, address, folder, name, rounds) for name in links}
    return Bench(rounds=rounds, load=os.getloadavg()[0], cores=os.cpu_count() or 1, offline_s=offline, networks=rows)


def record(folder: Path, artifact: Path, body: Bench) -> None:
    """Add the measured figures `body` to the summary of the run at `folder`.

    Raises ShoalError when the run has no summary, or the artifact is of another network.
    """
    run = Run(folder)
    if not run.has("summary.json"):
        raise ShoalError(f"found no summary at {folder}; need a run of shoal reduce that ended; resume it")
    summary, program = Summary.read(run), Program.load(artifact / "client")
    kept, relus = sum(relu.count for relu in Layout(program).relus.values()), summary.reduced["relus"]
    if kept != relus:
        raise ShoalError(f"found {kept:,} ReLUs in {artifact} and {relus:,} in {folder}; need that run's artifact")
    summary.reduced.setdefault("private", {})["networks"] = body["networks"]
    summary.write(run)


def _client(artifact: Path, address: str, folder: Path) -> Client:
    return Client(artifact / "client", address, client_tls(folder / "certs"), ClientOptions(pool=folder / "client"))


def _prepare(artifact: Path, address: str, folder: Path, count: int, batch: int) -> float:
    """Make `count` items; returns the seconds per item."""
    client = _client(artifact, address, folder)
    begun = time.perf_counter()
    with counter("items", count) as progress:
        client.prepare(count, batch=batch, progress=progress)
    client.close()
    return (time.perf_counter() - begun) / count


def _measure(artifact: Path, address: str, folder: Path, link: str, rounds: int) -> Timed:
    layout = Layout(Program.load(artifact / "client"))
    if link == "none":
        return _figures(_queries(artifact, address, folder, rounds), link_seconds(layout, LINKS[link]))
    achieved = probe(LINKS[link])
    with relayed(address, LINKS[link]) as relay:
        results = _queries(artifact, relay.address, folder, rounds)
        # These bytes include the uncounted query, the handshake and TLS.
        seen = {"up": relay.counters.up, "down": relay.counters.down}
    found = _figures(results, link_seconds(layout, Link(achieved.rate, achieved.rtt_s)))
    found["achieved"], found["relay_bytes"] = asdict(achieved), seen
    return found


def _queries(artifact: Path, address: str, folder: Path, rounds: int) -> list[Result]:
    program = Program.load(artifact / "client")
    most = min(1.0, program.input_limit)
    image = np.random.default_rng(0).uniform(-most, most, (1, *program.input_shape)).astype(np.float32)
    with _client(artifact, address, folder) as client:
        return [client.query(image) for _ in range(rounds + 1)][1:]


def _figures(results: list[Result], link_s: float) -> Timed:
    first = results[0]
    samples = [r.seconds for r in results]
    median = statistics.median(samples)
    return Timed(
        online_s=median,
        link_s=link_s,
        rest_s=median - link_s,
        fastest_s=min(samples),
        slowest_s=max(samples),
        samples_s=samples,
        bytes=first.bytes,
        messages=first.messages,
        latencies=first.latencies,
    )
