"""Private classes of many images against plaintext, and early exit in private on a trained network with three exits.

    python -m benchmarks.private.images --out benchmarks/results/private_images.json

Trains a small network with exits on scikit-learn's digits (each exit by cross-entropy), compiles it, and queries test
images from prepared randomness between two processes over mutual TLS: once to the last exit, once leaving at the first
exit that is as sure as a threshold. The threshold is chosen on the validation split: the lowest that loses at most 0.2
points there. The whole test set runs in the clear executor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal import Objective, Schedule, Settings, Spec, assemble, fit, load, relu_sites
from shoal.data.dataset import Dataset
from shoal.graph.graph import Graph
from shoal.measuring.loopback import client_tls, serving
from shoal.models import build
from shoal.private.compiler.deployment import clear_agreement, compare, deploy
from shoal.private.program.artifact import save_artifact
from shoal.private.serving.client import Client
from shoal.private.serving.result import Result
from shoal.private.transport.certs import make_certificates
from shoal.storage.environment import environment
from shoal.training.objective import cross_entropy

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


def trained(data: Dataset, width: float, epochs: int, seed: int) -> torch.nn.Module:
    """resnet10 with an exit after each of its first stages but the last."""
    plain = build("resnet10", data.classes, channels=data.shape[0], width=width)
    last = {site.stage: site.name for site in relu_sites(plain, data.shape) if site.block is not None}
    exits = tuple(last.values())[:-1][-2:]
    torch.manual_seed(seed)
    model = assemble(Spec("resnet10", data.classes, data.shape, width, exits=exits))
    terms = tuple(cross_entropy(exit=i, name=f"exit {i}") for i in range(len(exits) + 1))
    schedule = Schedule(epochs, lr=0.05, kind="cosine", warmup=1.0, nesterov=True)
    fit(model, data, Objective(terms), schedule, settings=Settings(seed=seed))
    return model.eval()


def exits_of(graph: Graph, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        parts = [graph(chunk) for chunk in images.split(256)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def leaving(logits: list[Tensor], threshold: float) -> Tensor:
    """The exit that each image takes."""
    sure = torch.stack([x.softmax(1).max(1).values >= threshold for x in logits])
    sure[-1] = True
    return sure.int().argmax(0)


def accuracy(logits: list[Tensor], taken: Tensor, labels: Tensor) -> float:
    guesses = torch.stack(logits).argmax(2)[taken, torch.arange(len(labels))]
    return 100.0 * float((guesses == labels).float().mean())


def chosen(logits: list[Tensor], labels: Tensor, loss: float = 0.2) -> float:
    """The lowest threshold that loses at most `loss` points of accuracy."""
    final = accuracy(logits, torch.full((len(labels),), len(logits) - 1), labels)
    fine = [t for t in THRESHOLDS if accuracy(logits, leaving(logits, t), labels) >= final - loss]
    return fine[0] if fine else 1.0


def row(results: list[Result], logits: list[Tensor], labels: Tensor, bound: float) -> dict[str, Any]:
    """Private answers against the float network's at the exits that were taken."""
    taken = torch.tensor([r.taken[0] for r in results])
    private = [torch.tensor(r.exits[t][0]) for r, t in zip(results, taken.tolist(), strict=True)]
    plain = torch.stack(logits)[taken, torch.arange(len(taken))]
    agreement = compare(plain, torch.stack(private))
    right = (torch.stack(private).argmax(1) == labels).float().mean()
    return asdict(agreement) | {
        "error_bound": bound,
        "accuracy": 100.0 * float(right),
        "exits_taken": dict(Counter(taken.tolist())),
        "online_s": statistics.mean(r.seconds for r in results),
        "online_s_by_exit": {
            t: statistics.median(r.seconds for r in results if r.taken[0] == t) for t in sorted(set(taken.tolist()))
        },
        "bytes": statistics.mean(r.bytes for r in results),
        "latencies": statistics.mean(r.latencies for r in results),
    }


def query(folder: Path, images: Tensor, batch: int, threshold: float | None) -> list[Result]:
    flags = [] if threshold is None else ["--early-exit"]
    with serving(folder / "artifact", folder / "certs", 2, flags=flags) as address:
        client = Client(folder / "artifact" / "client", address, client_tls(folder / "certs"))
        client.prepare(len(images), batch=batch, progress=lambda made, _: print("made", made, flush=True))
        with client:
            return [client.query(image[None].numpy(), exit_above=threshold) for image in images]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    data = load("digits", seed=a.seed)
    graph, program, weights = deploy(trained(data, a.width, a.epochs, a.seed), data)
    val, test = exits_of(graph, data.normalise(data.val.images)), data.normalise(data.test.images)
    threshold, logits = chosen(val, data.val.labels), exits_of(graph, test)
    clear, fixed = clear_agreement(graph, program, weights, test, data.test.labels)
    body: dict[str, Any] = {"settings": {k: v for k, v in vars(a).items() if k != "out"}, "threshold": threshold}
    body["test_set"] = {"clear": asdict(clear), "fixed_accuracy": fixed, "error_bound": program.error_bound}
    taken = leaving(logits, threshold)
    body["test_set"] |= {"leaving_accuracy": accuracy(logits, taken, data.test.labels)}
    body["test_set"] |= {f"exit_{i}_accuracy": accuracy([x], taken * 0, data.test.labels) for i, x in enumerate(logits)}
    body["test_set"]["exits_taken"] = torch.bincount(taken, minlength=len(logits)).tolist()
    few, labels = [x[: a.images] for x in logits], data.test.labels[: a.images]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_certificates(folder / "certs")
        save_artifact(folder / "artifact", program, weights)
        for name, above in (("to the end", None), ("early exit", threshold)):
            body[name] = row(query(folder, test[: a.images], a.batch, above), few, labels, program.error_bound)
            print(name, json.dumps(body[name]), flush=True)
    if a.out:
        a.out.write_text(json.dumps(body | {"environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
