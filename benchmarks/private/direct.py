"""Direct private inference, reduced beside baseline; server-owned beside shared weights; peak memory of both parties.

    python -m benchmarks.private.direct --out benchmarks/results/private_direct.json

Parties run as processes of their own over mutual TLS on loopback, and the networks compared alternate query by query
in one run. Weights are random: times and bytes depend on shapes and on the number of kept ReLUs alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.costs.protocols import spu_cheetah
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.models import build
from shoal.private.compiler.compilation import compile
from shoal.private.program.artifact import OT_KINDS, save_artifact
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.server import Server
from shoal.private.transport.certs import make_certificates
from shoal.reduction.budget import allocate
from shoal.reduction.gates import add_branches, commit_branches, set_gate
from shoal.reduction.masks import add_masks, random_masks
from shoal.storage.environment import environment
from shoal.surgery.sites import find_blocks, relu_sites
from shoal.surgery.tracing import trace

SHAPE = (3, 32, 32)
WAIT_S = 600.0
"""Seconds to wait for the other party: one step of a large network may take minutes on a small machine."""


def network(model: str, width: float, kept: float, blocks: int) -> Graph:
    """A folded network with random weights, a share `kept` of its ReLUs, and its first `blocks` blocks replaced."""
    torch.manual_seed(0)
    plain: nn.Module = build(model, 100, width=width).eval()
    sites = relu_sites(plain, SHAPE)
    if kept < 1:
        total = round(kept * sum(s.relus for s in sites))
        # Later layers keep more, as learned budgets do (the recovered ResNet18 vector rises about linearly).
        budget = allocate(sites, {s.name: i + 1.0 for i, s in enumerate(sites)}, total)
        plain = add_masks(plain, random_masks(budget, sites, torch.Generator().manual_seed(0)))
    if blocks:
        plain = add_branches(plain, find_blocks(plain, SHAPE)[:blocks])
        set_gate(plain, 1.0)
        plain = commit_branches(plain)
    return fold(trace(plain.eval(), SHAPE))


def open_session(stack: ExitStack, graph: Graph, folder: Path, tls: Any, shared: bool, ot_kind: str) -> Client:
    """A server thread and a client for `graph`; each side's SPU session is a process."""
    program, weights = compile(graph, torch.rand(16, *SHAPE) * 2 - 1)
    save_artifact(folder, program, weights, ot_kind=ot_kind)
    ours, theirs = (
        ServerOptions(timeout_s=WAIT_S, shared_weights=shared),
        ClientOptions(timeout_s=WAIT_S, mode="direct"),
    )
    server = stack.enter_context(Server(folder, "127.0.0.1:0", tls["server"], ours))
    threading.Thread(target=server.serve, args=(1,), daemon=True).start()
    return stack.enter_context(Client(folder, server.address, tls["client"], theirs))


def alternate(clients: dict[str, Client], graphs: dict[str, Graph], rounds: int) -> dict[str, Any]:
    """Means of every figure over `rounds` queries of each network in turn, after one that is not counted.

    Means, because the oblivious transfers are refilled in some queries and not in others.
    """
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in clients}
    x = (np.random.default_rng(0).random((1, *SHAPE)) * 2 - 1).astype(np.float32)
    for i in range(rounds + 1):
        for name, client in clients.items():
            r = client.query(x)
            with torch.no_grad():
                error = float(np.abs(r.logits - graphs[name](torch.from_numpy(x))[-1].numpy()).max())
            row = {k: getattr(r, k) for k in ("seconds", "relu_s", "linear_s", "bytes", "messages")}
            row |= {"client_peak_bytes": r.memory_bytes, "server_peak_bytes": client.server_memory_bytes}
            row |= {"logit_error": error}
            print(name, i, {k: round(v, 3) for k, v in row.items()}, flush=True)
            rows[name] += [row] if i else []
    return {name: {k: statistics.fmean(r[k] for r in rs) for k in rs[0]} for name, rs in rows.items()}


def counts(graph: Graph, client: Client) -> dict[str, Any]:
    total, model = cost(graph), spu_cheetah(graph)
    facts = {k: getattr(total, k) for k in ("relus", "macs", "depth", "relu_layers")}
    facts["fraction_bits"] = client.local.artifact.program.fraction_bits
    return facts | {"setup_s": client.setup_s, "predicted_s": model.seconds, "predicted_bytes": model.bytes}


def compare(nets: dict[str, tuple[Graph, bool]], rounds: int, tls: Any, ot_kind: str) -> dict[str, Any]:
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clients = {
            name: open_session(stack, g, root / name, tls, shared, ot_kind) for name, (g, shared) in nets.items()
        }
        graphs = {name: g for name, (g, _) in nets.items()}
        rows = alternate(clients, graphs, rounds)
        return {name: rows[name] | counts(graphs[name], clients[name]) for name in nets}


def ratio(rows: dict[str, Any], key: str, first: str, second: str) -> float:
    return rows[first][key] / rows[second][key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--kept", type=float, default=0.1)
    parser.add_argument("--blocks", type=int, default=4, help="blocks replaced: 4 are ResNet18's S1 and S2")
    parser.add_argument("--ot-kind", choices=OT_KINDS, default=OT_KINDS[0], help="SPU's oblivious transfers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small-width", type=float, default=0.25, help="width of the server-owned/shared comparison")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tls = make_certificates(Path(folder))
        full, less = (network(a.model, a.width, k, b) for k, b in ((1.0, 0), (a.kept, a.blocks)))
        main_rows = compare({"baseline": (full, False), "reduced": (less, False)}, a.rounds, tls, a.ot_kind)
        small = network(a.model, a.small_width, a.kept, 0)
        owner_rows = compare({"server-owned": (small, False), "shared": (small, True)}, a.rounds, tls, a.ot_kind)
    peak = max(row[k] for row in main_rows.values() for k in ("client_peak_bytes", "server_peak_bytes"))
    figures = {
        "kept_relus": ratio(main_rows, "relus", "reduced", "baseline"),
        "relu_seconds_reduced_over_baseline": ratio(main_rows, "relu_s", "reduced", "baseline"),
        "total_baseline_over_reduced": ratio(main_rows, "seconds", "baseline", "reduced"),
        "linear_server_owned_over_shared": ratio(owner_rows, "linear_s", "server-owned", "shared"),
        "peak_gib": peak / 2**30,
    }
    body = {"settings": {k: v for k, v in vars(a).items() if k != "out"}, "environment": environment()}
    body |= {"figures": figures, "reduced_beside_baseline": main_rows, "weights": owner_rows}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
