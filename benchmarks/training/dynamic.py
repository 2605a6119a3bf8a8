"""Dynamic inference on a trained run with exits: speed, searches of thresholds, and earlyon on the same network.

    shoal self-distill resnet18 --data fashion-mnist --width 0.25 --limit 15000 --epochs 8 --kind plain \
        --feature-weight 0 --no-baseline --out runs/dynamic
    python -m benchmarks.training.dynamic runs/dynamic --out benchmarks/results/dynamic.json

Thresholds lose no validation accuracy; seconds are those of test images, all ways in turns. earlyon (PyPI) is measured
where it can be imported: `pip install --no-deps earlyon`. It gets the same weights, and the thresholds that are best
for how it routes a batch, which leaves as one.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal.data.dataset import Dataset, Split
from shoal.exits.cascades import Cascade, cascade, strongest
from shoal.exits.classifiers import PREFIX, Exit
from shoal.exits.evidence import Evidence, collect, dynamic_outcome
from shoal.exits.inference import infer
from shoal.exits.latency import Classify, compare
from shoal.exits.thresholds import METHODS, Goal, search
from shoal.jobs.inputs import load_data
from shoal.networks.stored import load_whole
from shoal.storage.environment import environment
from shoal.storage.run import Run
from shoal.surgery.normal_form import normalise
from shoal.training.settings import Settings

LEVELS = 20


def searches(evidence: Evidence, prices: tuple[int, ...], count: int = 10_000) -> dict[str, dict[str, float]]:
    """Seconds and fitness of each way to search thresholds for `count` images, by the paper's fitness."""
    picked = np.arange(count) % len(evidence.right)
    some = Evidence(evidence.confidence[picked], evidence.right[picked], evidence.ensemble_right[picked])
    goal, rows = Goal(float(prices[-1]), some.accuracies[-1]), {}
    for method in METHODS:
        begun = time.perf_counter()
        found = search(some, prices, goal, method=method)
        rows[method] = {"seconds": time.perf_counter() - begun, "fitness": found.fitness}
    return rows


def batch_routed(
    evidence: Evidence, prices: tuple[int, ...], thresholds: tuple[float, ...], batch: int
) -> tuple[float, float]:
    """Accuracy in percent and mean price where a whole batch leaves at the first exit of which all are sure."""
    hits, paid = 0, 0.0
    for i in range(0, len(evidence.right), batch):
        sure, right = evidence.confidence[i : i + batch], evidence.right[i : i + batch]
        exit = next((k for k, t in enumerate(thresholds) if (sure[:, k] >= t).all()), evidence.exits - 1)
        hits += int(right[:, exit].sum())
        paid += prices[exit] * len(right)
    return 100 * hits / len(evidence.right), paid / len(evidence.right)


def best_batch_routed(evidence: Evidence, prices: tuple[int, ...], batch: int) -> tuple[float, ...]:
    """Of `LEVELS` quantiles an exit and 1.1 (nobody leaves), those that lose no accuracy at the least price."""
    levels = [
        np.unique([*np.quantile(column, np.linspace(0, 1, LEVELS)), 1.1]) for column in evidence.confidence.T[:-1]
    ]
    floor = evidence.accuracies[-1]
    tried = {t: batch_routed(evidence, prices, t, batch) for t in product(*(level.tolist() for level in levels))}
    return min((t for t in tried if tried[t][0] >= floor), key=lambda t: tried[t][1])


def wrapped(
    model: nn.Module, sites: tuple[str, ...], full: nn.Module, thresholds: tuple[float, ...], classes: int
) -> Any:
    """The same network in earlyon: the plain one with its exits hooked behind the same submodules."""
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    state, heads, points = model.state_dict(), {}, []
    for site in sites:
        name = PREFIX + site.replace(".", "_")
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        head = Exit(own["conv.weight"].shape[0], classes).eval()
        head.load_state_dict(own)
        heads[name.replace(".", "_")] = head
        points.append(ExitPoint(name.replace(".", "_"), site, own["conv.weight"].shape[0]))
    # A threshold above 1 is an exit that is switched off.
    config = EarlyExitConfig("resnet", classes, points, [1.0] * (len(points) + 1), [min(t, 1.0) for t in thresholds])
    config.enabled_exits = [t <= 1 for t in thresholds]
    made = EarlyExitWrapper(full, heads, nn.Identity(), config, (1, *next(iter(full.parameters())).shape[1:2], 28, 28))
    return made.eval()


def accuracy(classify: Classify, data: Dataset, split: Split, batch: int) -> float:
    """Percent right in batches, the last one too."""
    hits = 0
    with torch.inference_mode():
        for i in range(0, len(split), batch):
            logits = classify(data.normalise(split.images[i : i + batch]))
            hits += int((logits.argmax(1) == split.labels[i : i + batch]).sum())  # type: ignore[attr-defined]
    return 100 * hits / len(split)


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    run = Run(folder)
    spec, model = load_whole(run)
    data = load_data(run.config(), None, "cpu")
    network, full = cascade(model, spec.shape), strongest(model, spec.shape)
    val = collect(model, data, data.val, Settings())
    found = search(val, network.macs, Goal(float(network.full_macs), val.accuracies[-1], loss=0.0))
    test = dynamic_outcome(network, data, data.test, found.thresholds, False)
    body: dict[str, Any] = {"network": asdict(spec), "thresholds": found.thresholds, "exits": len(network)}
    body["macs"] = {"full": network.full_macs, "dynamic": test.price, "shares": test.shares}
    body["accuracy"] = {"full": accuracy(full, data, data.test, 500), "dynamic": test.accuracy}
    body["validation"] = {"full": val.accuracies[-1], "dynamic": found.accuracy}
    body["searches_of_10000"] = searches(collect(model, data, data.test, Settings()), network.macs)
    images = data.normalise(data.test.images[:2048])
    ways: dict[str, Classify] = {"full": full, "dynamic": lambda x: infer(network, x, found.thresholds)}
    body["seconds"] = {"1": compare(ways, images[:128], 1, rounds)}
    body["seconds"]["64"] = compare(
        ways | beside(body, model, spec.exits, full, network, val, data), images, 64, rounds
    )
    return body


def beside(
    body: dict[str, Any], model: nn.Module, sites: tuple[str, ...], full: nn.Module, network: Cascade, val: Evidence,
    data: Dataset,
) -> dict[str, Classify]:  # fmt: skip
    """earlyon's way of classifying a batch, if it is there; its thresholds and accuracy go into `body`."""
    try:
        import earlyon
    except ImportError:
        body["earlyon"] = None
        return {}
    thresholds = best_batch_routed(val, network.macs, 64)
    other = wrapped(normalise(model), sites, full, thresholds, data.classes)

    def classify(x: Tensor) -> Tensor:
        return other.forward_inference_batched(x).predictions

    found = {
        "version": earlyon.__version__,
        "thresholds": thresholds,
        "accuracy": accuracy(classify, data, data.test, 64),
    }
    body["earlyon"] = found | {"validation": batch_routed(val, network.macs, thresholds, 64)[0]}
    return {"earlyon": classify}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    body = {"settings": {"rounds": a.rounds, "threads": a.threads}, "environment": environment()} | measure(
        a.run, a.rounds
    )
    a.out.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
