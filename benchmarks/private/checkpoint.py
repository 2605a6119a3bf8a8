"""An adopted network and the network reduced from it: accuracy in fixed point, and private queries of both.

    shoal adopt examples/resnet_cifar.py:resnet20 --weights FILE --data cifar10 --normalise imagenet --out ADOPTED
    shoal reduce ADOPTED --preset quick --budget 47104 --out REDUCED
    python -m benchmarks.private.checkpoint ADOPTED REDUCED --data-dir DATA --out benchmarks/results/checkpoint.json

Accuracy is that of all test images, in fixed point in one process. The queries run between two processes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.private.queries import agreement, measure
from shoal.graph.counting import cost
from shoal.jobs.inputs import load_data
from shoal.networks.figures import counts
from shoal.networks.stored import load_network
from shoal.private.compiler.deployment import clear_agreement, deploy
from shoal.storage.environment import environment
from shoal.storage.run import Run


def row(folder: Path, data_dir: Path | None, queries: int, batch: int) -> dict[str, Any]:
    """Counts, accuracy and private queries of the network of one run."""
    run = Run(folder)
    _, network = load_network(run, "model")
    data = load_data(run.config(), data_dir)
    graph, program, weights = deploy(network, data)
    images = data.normalise(data.test.images[:])
    same, accuracy = clear_agreement(graph, program, weights, images, data.test.labels)
    found: dict[str, Any] = dict(counts(cost(graph))) | {"accuracy": accuracy, "fixed_point": asdict(same)}
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        logits, figures = measure(program, weights, images[:queries], batch, Path(scratch))
        return found | {"queries": agreement(graph(images[:queries])[-1].numpy(), logits) | figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adopted", type=Path)
    parser.add_argument("reduced", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    rows = {}
    for name in ("adopted", "reduced"):
        rows[name] = row(getattr(a, name), a.data_dir, a.queries, a.batch)
        print(name, json.dumps(rows[name]), flush=True)
    settings = {"queries": a.queries, "batch": a.batch, "command": Run(a.reduced).config()["options"]}
    if a.out:
        text = json.dumps({"settings": settings, "environment": environment(), "rows": rows}, indent=1)
        a.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
