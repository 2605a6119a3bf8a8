"""Whole networks inside SPU, as a yardstick: reduced beside baseline; server-owned beside shared weights; peak memory.

    python -m benchmarks.private.direct --out benchmarks/results/private_direct.json

shoal itself has no such mode. Parties run as processes of their own over plain TCP on loopback, and the networks
compared alternate query by query in one run. Each of SPU's matrix products is cut so that it has one answer, because
SPU re-randomises several answers with the same encryption of zero (`benchmarks.private.products`). Weights are random:
times and bytes depend on shapes and on the number of kept ReLUs alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.private.spu_parties import SpuParties
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.models import build
from shoal.private.compiler.compilation import compile
from shoal.private.program.artifact import OT_KINDS, save_artifact
from shoal.reduction.budget import allocate
from shoal.reduction.gates import add_branches, commit_branches, set_gate
from shoal.reduction.masks import add_masks, random_masks
from shoal.storage.environment import environment
from shoal.surgery.sites import find_blocks, relu_sites
from shoal.surgery.tracing import trace

SHAPE = (3, 32, 32)


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


def open_parties(stack: ExitStack, graph: Graph, folder: Path, shared: bool, ot_kind: str) -> SpuParties:
    """The two processes for `graph`."""
    program, weights = compile(graph, torch.rand(16, *SHAPE) * 2 - 1)
    save_artifact(folder, program, weights, ot_kind=ot_kind)
    return stack.enter_context(SpuParties(folder, shared=shared))


def alternate(parties: dict[str, SpuParties], graphs: dict[str, Graph], rounds: int) -> dict[str, Any]:
    """Means of every figure over `rounds` queries of each network in turn, after one that is not counted.

    Means, because the oblivious transfers are refilled in some queries and not in others.
    """
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in parties}
    x = (np.random.default_rng(0).random((1, *SHAPE)) * 2 - 1).astype(np.float32)
    for i in range(rounds + 1):
        for name, pair in parties.items():
            r = pair.query(x)
            with torch.no_grad():
                error = float(np.abs(r.logits - graphs[name](torch.from_numpy(x))[-1].numpy()).max())
            row = {k: getattr(r, k) for k in ("seconds", "relu_s", "linear_s", "bytes", "messages")}
            row |= {f"{side}_peak_bytes": peak for side, peak in r.memory_bytes.items()}
            row |= {"logit_error": error}
            print(name, i, {k: round(v, 3) for k, v in row.items()}, flush=True)
            rows[name] += [row] if i else []
    return {name: {k: statistics.fmean(r[k] for r in rs) for k in rs[0]} for name, rs in rows.items()}


def counts(graph: Graph, parties: SpuParties) -> dict[str, Any]:
    total = cost(graph)
    facts = {k: getattr(total, k) for k in ("relus", "macs", "depth", "relu_layers")}
    return facts | {"fraction_bits": parties.program.fraction_bits, "setup_s": parties.setup_s}


def compare(nets: dict[str, tuple[Graph, bool]], rounds: int, ot_kind: str) -> dict[str, Any]:
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        parties = {name: open_parties(stack, g, root / name, shared, ot_kind) for name, (g, shared) in nets.items()}
        graphs = {name: g for name, (g, _) in nets.items()}
        rows = alternate(parties, graphs, rounds)
        return {name: rows[name] | counts(graphs[name], parties[name]) for name in nets}


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
    full, less = (network(a.model, a.width, k, b) for k, b in ((1.0, 0), (a.kept, a.blocks)))
    main_rows = compare({"baseline": (full, False), "reduced": (less, False)}, a.rounds, a.ot_kind)
    small = network(a.model, a.small_width, a.kept, 0)
    owner_rows = compare({"server-owned": (small, False), "shared": (small, True)}, a.rounds, a.ot_kind)
    peak = max(row[k] for row in main_rows.values() for k in ("client_peak_bytes", "server_peak_bytes"))
    figures = {
        "kept_relus": ratio(main_rows, "relus", "reduced", "baseline"),
        "relu_seconds_reduced_over_baseline": ratio(main_rows, "relu_s", "reduced", "baseline"),
        "total_baseline_over_reduced": ratio(main_rows, "seconds", "baseline", "reduced"),
        "linear_server_owned_over_shared": ratio(owner_rows, "linear_s", "server-owned", "shared"),
        "peak_gib": peak / 2**30,
    }
    settings = {k: v for k, v in vars(a).items() if k != "out"} | {"cut": True}
    body = {"settings": settings, "environment": environment()}
    body |= {"figures": figures, "reduced_beside_baseline": main_rows, "weights": owner_rows}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
