"""What a sweep saves: small runs on several workers against the same runs one after the other.

    python -m benchmarks.training.sweep --out benchmarks/results/sweep.json

Both sides go through the same engine, and the lone worker's run has all cores, as it has in a shell loop. Needs an idle
machine with as many free cores as workers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import typer.main

from shoal.cli.app import app
from shoal.cli.sweep import commands
from shoal.storage.environment import environment
from shoal.sweep.engine import Sweep
from shoal.sweep.folder import Folder
from shoal.sweep.grid import read_grid
from shoal.sweep.processes import LocalExecutor, cores

GRID = """
command: train
model: resnet10
data: digits
width: {width}
epochs: {epochs}
grid:
  seed: [{seeds}]
"""


def measure(workers: int, runs: int, epochs: int, width: float) -> dict[str, Any]:
    """Wall seconds of the whole sweep in a folder of its own, and of its runs."""
    with tempfile.TemporaryDirectory() as place:
        file, folder = Path(place) / "grid.yaml", Folder(Path(place) / "sweep")
        file.write_text(GRID.format(epochs=epochs, width=width, seeds=", ".join(map(str, range(runs)))))
        planned = read_grid(file, commands(typer.main.get_command(app)), folder.path)
        begun = time.perf_counter()
        with folder.opened(planned):
            records = Sweep(folder, planned, LocalExecutor(workers)).run()
        seconds = time.perf_counter() - begun
    bad = [record.run.name for record in records if record.state != "finished"]
    if bad:
        raise SystemExit(f"found unfinished runs: {', '.join(bad)}")
    return {
        "workers": workers,
        "seconds": seconds,
        "run_seconds": [record.seconds for record in records],
        "accuracies": [record.result["accuracy"] for record in records],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--widths", type=float, nargs="+", default=[0.125, 0.25], help="of resnet10")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="both sides alternate so often; the ratio is of sums")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    given = {k: v for k, v in vars(a).items() if k != "out"}
    body = {"settings": given, "environment": environment() | {"usable_cores": cores()}, "widths": {}}
    for width in a.widths:
        body["widths"][f"{width:g}"] = row = compared(a, width)
        print(f"resnet10 x {width:g}: {row['ratio']:.2f}x", flush=True)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(body, indent=1) + "\n")


def compared(a: argparse.Namespace, width: float) -> dict[str, Any]:
    """Both sides of one network, and the ratio of their seconds."""
    sides: dict[int, list[dict[str, Any]]] = {1: [], a.workers: []}
    for i in range(a.rounds):
        # The order flips every round, so that neither side always meets the warmer machine.
        for workers in (1, a.workers) if i % 2 == 0 else (a.workers, 1):
            sides[workers].append(measure(workers, a.runs, a.epochs, width))
    alone, together = (sum(row["seconds"] for row in sides[workers]) for workers in (1, a.workers))
    return {"ratio": alone / together, "one_after_the_other": sides[1], "together": sides[a.workers]}


if __name__ == "__main__":
    main()
