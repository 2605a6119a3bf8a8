"""The cost model's forecasts beside measurements: seconds and bytes, offline and online, of ten networks.

    shoal calibrate --out machine.json
    python -m benchmarks.private.cost_model --machine machine.json --out benchmarks/results/cost_model.json

Weights are random. Server and client are processes of their own, over mutual TLS on loopback; none of these networks
was seen in calibration. SEAL makes the masked products, as in the forecast. Offline seconds leave out the first batch,
in which SPU makes its keys; online seconds are those of rehearsal queries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from benchmarks.private.direct import SHAPE, network
from benchmarks.private.phases import process, tls_of
from benchmarks.private.spu_parties import WAIT_S
from shoal.costs.machine import Machine
from shoal.costs.model import layout_of, prepared_cost
from shoal.graph.graph import Graph
from shoal.measuring.bench import Request, bench
from shoal.private.compiler.compilation import compile
from shoal.private.program.artifact import save_artifact
from shoal.private.program.program import Program, Weights
from shoal.private.protocol.layout import Layout
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions
from shoal.private.serving.prepared import Offline
from shoal.private.transport.certs import make_certificates
from shoal.storage.environment import environment

matplotlib.use("Agg")
PRODUCTS = "seal"
Case = tuple[str, float, float, int]
NETWORKS: tuple[Case, ...] = (
    ("resnet18", 0.125, 1.0, 0),
    ("resnet18", 0.25, 1.0, 0),
    ("resnet18", 0.25, 0.1, 4),
    ("resnet18", 0.125, 0.1, 6),
    ("resnet10", 0.25, 1.0, 0),
    ("resnet10", 0.5, 1.0, 0),
    ("resnet10", 0.5, 0.1, 2),
    ("resnet20", 1.0, 1.0, 0),
    ("resnet20", 1.0, 0.1, 3),
    ("resnet32", 0.5, 0.2, 5),
)
"""Model, width, share of ReLUs kept, blocks replaced."""


def measure(case: Case, phases: list[str], folder: Path, certs: Path, items: int) -> dict[str, Any]:
    """The phases asked for, of one network, compiled."""
    program, weights = compiled(network(*case))
    save_artifact(folder, program, weights)
    row = {"network": " ".join(map(str, case)), "stored_bytes": Layout(program).stored_bytes(True), "measured": {}}
    for phase in phases:
        row["measured"] |= PHASES[phase](folder, certs, items)
    return row


def offline(folder: Path, certs: Path, items: int) -> dict[str, float]:
    tls, options = tls_of(certs, "client"), ClientOptions(timeout_s=WAIT_S)
    with process("--serve", folder, certs, PRODUCTS) as address, Client(folder, address, tls, options) as client:
        made = client.prepare(items + 1).later
        disk = client.pool.bytes() / (items + 1)
    found = {f"offline_{unit}": _total(made, unit) for unit in ("seconds", "bytes")}
    return {"offline_s": found["offline_seconds"], "offline_bytes": found["offline_bytes"], "disk_bytes": disk}


def _total(made: Offline, unit: str) -> float:
    return sum(row[unit] for row in made.kinds.values()) / made.items


def online(folder: Path, certs: Path, items: int) -> dict[str, float]:
    found = bench(folder, Request(("none",), 8 * items, rehearse=True))["networks"]["none"]
    return {"online_s": found["online_s"], "online_bytes": found["bytes"]}


PHASES = {"offline": offline, "online": online}
TITLES = {"offline": "offline, seconds an item", "online": "online, seconds a query"}


def compiled(graph: Graph) -> tuple[Program, Weights]:
    torch.manual_seed(0)
    return compile(graph, torch.rand(16, *SHAPE) * 2 - 1)


def forecasts(graph: Graph, machine: Machine) -> dict[str, Any]:
    """Of the compiled network, and of its graph alone."""
    row = {}
    for name, layout in (("forecast", Layout(compiled(graph)[0])), ("forecast_uncompiled", layout_of(graph))):
        cost = prepared_cost(layout, machine)
        row[name] = {"offline_s": cost.offline.seconds, "offline_bytes": cost.offline.bytes}
        row[name] |= {"online_s": cost.online.seconds, "online_bytes": cost.online.bytes}
    return row


def measured(a: argparse.Namespace) -> list[dict[str, Any]]:
    """What was measured before, with the phases asked for measured anew."""
    before = json.loads(a.again.read_text())["networks"] if a.again else [{"measured": {}} for _ in NETWORKS]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        make_certificates(Path(scratch) / "certs")
        for i, (case, old) in enumerate(zip(NETWORKS, before, strict=True)):
            row = measure(case, a.phases, Path(scratch) / str(i), Path(scratch) / "certs", a.items)
            rows.append(row | {"measured": old["measured"] | row["measured"]})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Forecasts against measurements; the line is a perfect forecast."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    figure, axes = plt.subplots(1, len(PHASES), figsize=(10, 5.2))
    for axis, phase in zip(axes, PHASES, strict=True):
        measured = np.array([row["measured"][f"{phase}_s"] for row in rows])
        forecast = np.array([row["forecast"][f"{phase}_s"] for row in rows])
        ends = [0.7 * min(measured.min(), forecast.min()), 1.4 * max(measured.max(), forecast.max())]
        axis.plot(ends, ends, color="#888888", linewidth=1)
        axis.fill_between(ends, [0.8 * e for e in ends], [1.25 * e for e in ends], color="#dddddd", label="20 % off")
        axis.scatter(measured, forecast, color="#1f5f8b", zorder=3)
        for i, (x, y) in enumerate(zip(measured, forecast, strict=True)):
            axis.annotate(str(i + 1), (x, y), (6, -3), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=TITLES[phase])
        axis.set(xlabel="measured", ylabel="forecast")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter(FormatStrFormatter("%g"))
            side.set_minor_locator(NullLocator())
        axis.legend(loc="upper left", frameon=False, fontsize=8)
    names = [f"{i + 1} {_label(row['network'])}" for i, row in enumerate(rows)]
    lines = ["     ".join(names[i : i + 4]) for i in range(0, len(names), 4)]
    figure.text(0.5, 0.01, "\n".join(lines), ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=150)


def _label(network: str) -> str:
    name, width, kept, _ = network.split()
    return f"{name} x {width}, {float(kept):.0%} of the ReLUs"


def errors(rows: list[dict[str, Any]], forecast: str) -> dict[str, dict[str, float]]:
    """Forecast over measurement: the median and the extremes over the networks."""
    table = {}
    for name in (f"{phase}_{unit}" for phase in PHASES for unit in ("s", "bytes")):
        ratios = [row[forecast][name] / row["measured"][name] for row in rows]
        off = [abs(ratio - 1) for ratio in ratios]
        table[name] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        table[name] |= {"median_error": statistics.median(off), "worst_error": max(off)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", type=Path, required=True, help="what shoal calibrate wrote")
    parser.add_argument("--items", type=int, default=3, help="items and queries that count, after one")
    parser.add_argument("--again", type=Path, help="a result file with phases that are not measured anew")
    parser.add_argument("--phases", nargs="*", choices=PHASES, default=list(PHASES), help="phases to measure")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/cost_model.png"))
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    rows = [
        row | forecasts(network(*case), Machine.load(a.machine))
        for row, case in zip(measured(a), NETWORKS, strict=True)
    ]
    body: dict[str, Any] = {
        "machine": asdict(Machine.load(a.machine)),
        "items": a.items,
        "products": PRODUCTS,
        "networks": rows,
    }
    body |= {"forecast_over_measured": {k: errors(rows, k) for k in ("forecast", "forecast_uncompiled")}}
    print(json.dumps(body["forecast_over_measured"], indent=1))
    plot(rows, a.plot)
    if a.out:
        a.out.write_text(json.dumps(body | {"environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
