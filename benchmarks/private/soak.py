"""Many clients at one server for a while: is anything lost or mixed, and how long do queries take?

    python -m benchmarks.private.soak --minutes 5 --clients 8 --out benchmarks/results/private_soak.json

Every client is a process with a pool and images of its own, the server another, all over mutual TLS on loopback. In
rounds, items are dealt to everybody, then all clients open a session at once and spend theirs as fast as they can;
only that counts as time. The network is tiny on purpose: more queries, more chances to go wrong. Exits with 1 if any
did.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.errors import ShoalError
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions
from shoal.private.transport.certs import TLS, make_certificates
from shoal.storage.environment import environment

# The trusted dealer that stocks pools without SPU is a test's: a product has no use for somebody who sees everything.
from tests.support.dealing import deal, folders
from tests.support.forked import forked, heard, serve
from tests.support.parties import Case, Small, case, seeded, small_mask

ITEMS = 40
"""Queries of a client in a round."""


def visit(pipe: Connection, folder: Path, tls: TLS, pool: Path, address: str, images: np.ndarray) -> None:
    """A client that, each time it is told a number, opens a session, asks so often, and says what it got."""
    turn = 0
    while count := pipe.recv():
        answers: list[tuple[int, np.ndarray, float]] = []
        error = ""
        try:
            with Client(folder, address, tls, ClientOptions(pool=pool)) as client:
                for _ in range(count):
                    turn = (turn + 1) % len(images)
                    result = client.query(images[turn : turn + 1])
                    answers.append((turn, result.logits[0], result.seconds))
        except ShoalError as found:
            error = str(found)
        pipe.send((answers, error))


class Soak:
    """One run: counts what went right, and keeps what did not."""

    def __init__(self, net: Case, clients: int) -> None:
        self.net = net
        self.images = np.array_split(net.images.numpy(), clients)
        self.truth = np.array_split(net.truth(len(net.images)), clients)
        self.bound = net.program.error_bound
        everything = np.concatenate(self.truth)
        apart = np.abs(everything[:, None] - everything[None]).max(2) + np.eye(len(everything))
        assert apart.min() > 2 * self.bound, "an answer to another image would not be noticed"
        self.seconds, self.latencies, self.worst, self.wrong = 0.0, list[float](), 0.0, 0
        self.errors: list[str] = []
        self.resident: list[float] = []

    def round(self, pipes: list[Connection], where: list[tuple[Path, Path]]) -> None:
        """Deal, let all clients loose at once, and check every answer against its own image's."""
        for pair in where:
            deal(self.net, pair, ITEMS)
        begun = time.perf_counter()
        for pipe in pipes:
            pipe.send(ITEMS)
        for truth, pipe in zip(self.truth, pipes, strict=True):
            answers, error = heard(pipe)
            self.errors += [error] * bool(error)
            for turn, logits, seconds in answers:
                off = float(np.abs(logits - truth[turn]).max())
                self.wrong, self.worst = self.wrong + (not off <= self.bound), max(self.worst, off)
                self.latencies.append(seconds)
        self.seconds += time.perf_counter() - begun

    def figures(self, rounds: int, where: list[tuple[Path, Path]], server_errors: list[str]) -> dict[str, Any]:
        """What is to be reported. `lost`, `repeated` and `left` compare the folders with the queries answered."""
        names = [[(folder / "spent").read_text().split() for folder in pair] for pair in where]
        left = [
            p for pair in where for f in pair for kind in ("item", "staged", "claimed") for p in f.glob(f"*.{kind}")
        ]
        milliseconds = [1e3 * s for s in self.latencies]
        asked, cuts = rounds * len(where) * ITEMS, statistics.quantiles(milliseconds, n=20)
        return {
            "clients": len(where),
            "rounds": rounds,
            "seconds": self.seconds,
            "queries": len(milliseconds),
            "queries_per_second": len(milliseconds) / self.seconds,
            "latency_ms": {"median": cuts[9], "p95": cuts[18], "max": max(milliseconds)},
            "worst_error": self.worst,
            "error_bound": self.bound,
            "wrong": self.wrong,
            "lost": asked - len(milliseconds),
            "repeated": sum(len(side) - len(set(side)) for pair in names for side in pair),
            "unequal_ledgers": sum(set(mine) != set(theirs) for mine, theirs in names),
            "unaccounted": asked - sum(len(set(mine)) for mine, _ in names),
            "left": len(left),
            "client_errors": self.errors,
            "server_errors": server_errors,
            "server_resident_mib": {"first": self.resident[0], "last": self.resident[-1]},
        }


NOTHING = ("wrong", "lost", "repeated", "unequal_ledgers", "unaccounted", "left", "client_errors", "server_errors")
"""Figures that must be zero or empty."""


def resident(pid: int | None) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def soak(minutes: float, clients: int, root: Path) -> dict[str, Any]:
    net = case(seeded(Small), root / "net", {"relu": small_mask()})
    tls, run, rounds = make_certificates(root / "certs"), Soak(net, clients), 0
    homes = [root / str(i) for i in range(clients)]
    where = [folders(net, h, root / "server", tls["client"].cert, f"{i:016x}") for i, h in enumerate(homes)]
    with contextlib.ExitStack() as stack:
        # A session that ends may overlap with the client's next.
        most = {"max_clients": 2 * clients, "certificate_sessions": 2 * clients, "query_budget": 0}
        start = forked(serve, net.folder, tls["server"], root / "server", **most)
        server, words = stack.enter_context(start)
        address, pipes = heard(words), []
        for home, images in zip(homes, run.images, strict=True):
            start = forked(visit, net.folder / "client", tls["client"], home, address, images)
            pipes.append(stack.enter_context(start)[1])
        while run.seconds < 60 * minutes:
            run.round(pipes, where)
            run.resident.append(resident(server.pid))
            rounds += 1
        words.send("errors")
        return run.figures(rounds, where, heard(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(a.minutes, a.clients, Path(folder))
    body = {"settings": {"minutes": a.minutes, "clients": a.clients}, "environment": environment(), "figures": figures}
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    sys.exit(any(figures[name] for name in NOTHING))


if __name__ == "__main__":
    main()
