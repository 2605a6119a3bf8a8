"""Prepared private inference of a ResNet18 shape: online, offline and floor, beside the whole network inside SPU.

    python -m benchmarks.private.phases --out benchmarks/results/private_phases.json

Weights are random: times and bytes depend on shapes and on the number of kept ReLUs alone. Server and client are
processes of their own, over mutual TLS on loopback. The floor is the same messages on the same kind of connection with
no computing, plus the network's plain float convolutions. Queries, bare exchanges and plain convolutions alternate, so
that a busy machine slows down all of them. Between two queries is a pause, in which both parties claim and read the
next item. With --rehearse no items are made: random words take their place, the logits are wrong, the times are not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.private.direct import SHAPE, network
from benchmarks.private.spu_parties import WAIT_S, SpuParties
from shoal.graph.counting import cost
from shoal.graph.graph import Graph
from shoal.jobs.serve import share_cores
from shoal.measuring.rehearsal import stock
from shoal.private.compiler.compilation import compile
from shoal.private.program.artifact import save_artifact
from shoal.private.protocol.layout import Layout
from shoal.private.serving.client import Client, Result
from shoal.private.serving.options import PRODUCTS, ClientOptions, ServerOptions
from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS, make_certificates
from shoal.private.transport.channel import admit, connect, listen
from shoal.private.transport.wire import SocketWire
from shoal.storage.environment import environment

PAUSE_S = 0.2
"""Seconds between two queries."""


def sized(relus: int, blocks: int, model: str) -> Graph:
    """A network of exactly `blocks` replaced blocks and about `relus` ReLUs left."""
    whole = cost(network(model, 1.0, 1.0, 0)).relus
    if relus >= whole:
        return network(model, 1.0, 1.0, 0)
    kept = relus / whole
    for _ in range(3):
        graph = network(model, 1.0, kept, blocks)
        kept *= relus / cost(graph).relus
    return graph


class Watched(SocketWire):
    """A wire that notes its script: words sent and received, message by message."""

    script: list[tuple[int, int]]

    def _both(self, mine: Any, words: int) -> Any:
        self.script.append((0 if mine is None else mine.size, words))
        return super()._both(mine, words)


@contextlib.contextmanager
def process(*arguments: object) -> Iterator[str]:
    """Another run of this file that prints its address and serves until we are done with it."""
    command = [sys.executable, "-m", "benchmarks.private.phases", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            yield child.stdout.readline().strip()
        finally:
            child.kill()


def serve(folder: str, certificates: str, products: str = PRODUCTS[0], workers: str = "2") -> None:
    tls = tls_of(Path(certificates), "server")
    options = ServerOptions(timeout_s=WAIT_S, engines=2, products=products, threads=share_cores(), workers=workers)
    with Server(folder, "127.0.0.1:0", tls, options) as server:
        print(server.address, flush=True)
        server.serve()


def echo(script: str, certificates: str) -> None:
    """The server's end of the bare exchanges: plays every script that it is asked for, mirrored."""
    steps, listener = json.loads(Path(script).read_text()), listen("127.0.0.1:0")
    print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
    sock, peer = listener.accept()
    channel = admit(sock, peer[0], tls_of(Path(certificates), "server"))
    while True:
        play(SocketWire(channel, 60.0), [(theirs, mine) for mine, theirs in steps])


def play(wire: SocketWire, steps: list[tuple[int, int]]) -> None:
    for mine, theirs in steps:
        wire._both(np.zeros(mine, np.uint64) if mine else None, theirs)


def tls_of(folder: Path, name: str) -> TLS:
    return TLS(folder / f"{name}.pem", folder / f"{name}.key", folder / "ca.pem")


def alternate(
    client: Client, x: np.ndarray, graph: Graph, folder: Path, certificates: Path, rounds: int
) -> tuple[list[Result], dict[str, float]]:
    """The results of `rounds` queries, and the median seconds of the bare exchanges and of the plain convolutions."""
    script, path = record(client, x), folder / "script.json"
    path.write_text(json.dumps(script))
    queries, bare, plains = list[Result](), list[float](), list[float]()
    with process("--echo", path, certificates) as address:
        channel = connect(address, tls_of(certificates, "client"), 30.0)
        for _ in range(rounds + 1):
            time.sleep(PAUSE_S)
            queries.append(client.query(x))
            begun = time.perf_counter()
            play(SocketWire(channel, 60.0), script)
            bare.append(time.perf_counter() - begun)
            plains.append(plain(graph, x))
    return queries[1:], {"exchanges_s": statistics.median(bare[1:]), "plain_s": statistics.median(plains[1:])}


def plain(graph: Graph, x: np.ndarray) -> float:
    """Seconds of the float network without its ReLUs, by and large its convolutions; the faster of two runs."""
    image, times = torch.from_numpy(x), []
    with torch.no_grad():
        for _ in range(2):  # the query before has taken its weights out of the caches
            begun = time.perf_counter()
            graph(image)
            times.append(time.perf_counter() - begun)
    return min(times)


def measure(graph: Graph, folder: Path, certificates: Path, a: argparse.Namespace, direct: bool) -> dict[str, Any]:
    program, weights = compile(graph, torch.rand(16, *SHAPE) * 2 - 1, fraction_bits=a.fraction_bits)
    save_artifact(folder, program, weights)
    x = (np.random.default_rng(0).random((1, *SHAPE)) * 2 - 1).astype(np.float32)
    with torch.no_grad():
        truth = graph(torch.from_numpy(x))[-1].numpy()
    row, count = facts(graph, Layout(program)), a.rounds + 2
    if a.rehearse:
        stock(Layout(program), (folder / "client/pool", folder / "server/pool"), certificates / "client.pem", count)
    with process("--serve", folder, certificates) as address:
        options = ClientOptions(timeout_s=WAIT_S, claim_ahead=True)
        client = Client(folder, address, tls_of(certificates, "client"), options)
        if not a.rehearse:
            begun = time.perf_counter()
            client.prepare(count, batch=a.batch, progress=lambda made, _: print("made", made, flush=True))
            row["offline_s"] = (time.perf_counter() - begun) / count
        with client:
            queries, bounds = alternate(client, x, graph, folder, certificates, a.rounds)
        row |= {k: statistics.median(getattr(q, k) for q in queries) for k in ("relu_s", "linear_s", "bytes")}
        row |= {"online_s": statistics.median(q.seconds for q in queries)} | bounds
        row |= {"messages": queries[0].messages, "latencies": queries[0].latencies}
        row["logit_error"] = max(float(np.abs(q.logits - truth).max()) for q in queries)
        row["error_bound"] = program.error_bound
        if direct and not a.rehearse:
            row["direct_s"] = direct_seconds(folder, x, a.direct_rounds)
    row["floor_s"] = row["exchanges_s"] + row["plain_s"]
    return row


def record(client: Client, x: np.ndarray) -> list[tuple[int, int]]:
    """The client's messages of one more query."""
    import shoal.private.serving.prepared as prepared

    Watched.script = []
    prepared.SocketWire = Watched  # type: ignore[misc]
    client.query(x)
    prepared.SocketWire = SocketWire  # type: ignore[misc]
    return Watched.script


def direct_seconds(folder: Path, x: np.ndarray, rounds: int) -> float:
    """Median seconds of a query that runs inside SPU as a whole."""
    with SpuParties(folder) as parties:
        times = [parties.query(x).seconds for _ in range(rounds + 1)]
    print("direct", times, flush=True)
    return statistics.median(times[1:])


def facts(graph: Graph, layout: Layout) -> dict[str, Any]:
    total = cost(graph)
    return {k: getattr(total, k) for k in ("relus", "macs", "depth", "relu_layers")} | {
        "fraction_bits": layout.program.fraction_bits,
        "sign_bits": sorted(layout.program.sign_bits.values()),
        "exact_truncations": len(layout.exact),
        "failure_bound": layout.program.failure_bound,
        "disk_bytes": {"client": layout.stored_bytes(True), "server": layout.stored_bytes(False)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--relus", type=int, nargs="+", default=[557_056, 49_600, 24_900, 24_900])
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[0, 3, 3, 7], help="blocks replaced in each; 3: 14 convolutions, 7: 10"
    )
    parser.add_argument("--fraction-bits", type=int)
    parser.add_argument("--batch", type=int, default=7, help="items made together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--direct-rounds", type=int, default=3)
    parser.add_argument("--rehearse", action="store_true", help="random words in place of items; times of queries only")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--echo", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    if a.serve or a.echo:
        return serve(*a.serve) if a.serve else echo(*a.echo)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        make_certificates(Path(folder) / "certs")
        for i, (relus, blocks) in enumerate(zip(a.relus, a.blocks, strict=True)):
            graph = sized(relus, blocks, a.model)
            rows[f"{relus}" if blocks < 7 else f"{relus}, {blocks} blocks replaced"] = row = measure(
                graph, Path(folder) / str(i), Path(folder) / "certs", a, i == 0
            )
            print(json.dumps(row), flush=True)
    write(a, rows)


def write(a: argparse.Namespace, rows: dict[str, Any]) -> None:
    direct = next(iter(rows.values())).get("direct_s")
    figures = {relus: {"online_over_floor": row["online_s"] / row["floor_s"]} for relus, row in rows.items()}
    for relus, row in rows.items() if direct else ():
        figures[relus]["online_times_faster_than_direct"] = direct / row["online_s"]
        figures[relus]["offline_and_online_over_direct"] = (row["offline_s"] + row["online_s"]) / direct
    settings = {k: v for k, v in vars(a).items() if k not in ("out", "serve", "echo")}
    body = {"settings": settings, "environment": environment(), "figures": figures, "networks": rows}
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
