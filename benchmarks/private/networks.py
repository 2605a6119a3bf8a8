"""Prepared queries of ResNet18 shapes without a network, over a LAN and over a WAN, beside the cost model's forecast.

    python -m benchmarks.private.networks --out benchmarks/results/private_networks.json

Weights are random. Server and client are processes of their own over mutual TLS; a relay in user space delays and paces
both directions (3 Gbit/s and 0.3 ms there and back; 400 Mbit/s and 40 ms) and is tried first. Items are rehearsals:
random words of the right shapes, so that seconds, bytes and messages are real and logits are not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.private.direct import SHAPE
from benchmarks.private.phases import sized
from shoal.costs.links import LINKS
from shoal.costs.machine import Machine
from shoal.costs.model import prepared_cost
from shoal.exits.classifiers import add_exits, keep_exit
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.measuring.bench import Request, bench
from shoal.models import build
from shoal.private.compiler.compilation import compile
from shoal.private.program.artifact import save_artifact
from shoal.private.protocol.layout import Layout
from shoal.storage.environment import environment
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import trace


def auxiliary() -> Graph:
    """The unreduced network up to its auxiliary classifier, before the last stage."""
    torch.manual_seed(0)
    plain = build("resnet18", 100).eval()
    sites = relu_sites(plain, SHAPE)
    point = [site.name for site in sites if site.stage < sites[-1].stage][-1]
    return fold(trace(keep_exit(add_exits(plain, [point], 100, SHAPE), 0).eval(), SHAPE))


def graphs() -> dict[str, Graph]:
    """The networks by what is left of them."""
    return {
        "all ReLUs": sized(557_056, 0, "resnet18"),
        "49,600 ReLUs, 17 convs": sized(49_600, 0, "resnet18"),
        "49,600 ReLUs, 14 convs": sized(49_600, 3, "resnet18"),
        "24,900 ReLUs, 14 convs": sized(24_900, 3, "resnet18"),
        "24,900 ReLUs, 10 convs": sized(24_900, 7, "resnet18"),
        "all ReLUs, auxiliary exit": auxiliary(),
    }


def measure(graph: Graph, folder: Path, rounds: int, machine: Machine) -> dict[str, Any]:
    program, weights = compile(graph, torch.rand(16, *SHAPE) * 2 - 1)
    save_artifact(folder, program, weights)
    total, layout = cost(graph), Layout(program)
    row: dict[str, Any] = {k: getattr(total, k) for k in ("relus", "macs", "depth", "relu_layers")}
    row["networks"] = bench(folder, Request(rounds=rounds, rehearse=True))["networks"]
    for name, network in LINKS.items():
        row["networks"][name]["forecast_s"] = prepared_cost(layout, machine, network).online.seconds
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--machine", type=Path, help="constants for the forecasts, from shoal calibrate")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    machine, rows = Machine.load(a.machine) if a.machine else Machine(), {}
    with tempfile.TemporaryDirectory() as scratch:
        for i, (name, graph) in enumerate(graphs().items()):
            rows[name] = measure(graph, Path(scratch) / str(i), a.rounds, machine)
            print(name, json.dumps(rows[name]), flush=True)
    if a.out:
        body = {"rounds": a.rounds, "networks": rows, "environment": environment()}
        a.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
