"""What a sweep at the papers' settings came to, beside what the papers print; and the checksums of its networks.

    shoal sweep examples/paper/resnet18.yaml --out runs/resnet18 --workers 1
    python -m benchmarks.training.paper_scale runs/resnet18 --out benchmarks/results/paper_resnet18.json
    python -m benchmarks.training.paper_scale runs/resnet18 --check benchmarks/results/paper_resnet18.json

Accuracy is that of the test set, of the epoch with most validation accuracy. The fixed-point accuracy is that of the
program that two parties would run, in the clear, on the same images. The result lists each network's SHA-256, for a
release to hold its files, and the command line that makes it again; --check compares files with that list.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from shoal.data.dataset import Dataset
from shoal.jobs.inputs import load_data
from shoal.networks.figures import figures
from shoal.networks.stored import load_network
from shoal.private.compiler.deployment import clear_agreement, deploy
from shoal.storage.environment import environment
from shoal.storage.run import Run
from shoal.training.settings import Settings

SHALLOW = "Making Models Shallow Again (CVPRW'23), Tables 1 and 2; its baseline"
PRUNER = "ReLUPruner (AAAI-26)"
BCD = "SNL (ICML'22), as listed by the authors of coordinate descent"
DEEP = "DeepReDuce (ICML'21), Tables 1, 2, 4 and 7"
AXES = ("masks", "budget", "keep")
"""Axes of a sweep whose values are part of a network's name."""

CIFAR100: dict[str, tuple[float, str]] = {
    "resnet18 teacher": (78.05, SHALLOW),
    "resnet18 masked 49600": (75.28, SHALLOW),
    "resnet18 gated 49600": (74.62, SHALLOW),
    "resnet18 masked 24900": (70.59, SHALLOW),
    "resnet18 gated 24900": (69.10, SHALLOW),
    "resnet18 auxiliary 100000 final": (78.24, SHALLOW),
    "resnet18 auxiliary 100000 auxiliary": (76.31, SHALLOW),
    "wrn-22-8 teacher": (80.82, SHALLOW),
    "wrn-22-8 masked 240000": (79.81, SHALLOW),
    "wrn-22-8 gated 240000": (79.62, SHALLOW),
    "resnet18 learner relupruner 12900": (68.28, PRUNER),
    "resnet18 learner relupruner 24900": (71.98, PRUNER),
    "resnet18 learner relupruner 50000": (77.90, PRUNER),
    "resnet18 learner relupruner 100000": (78.12, PRUNER),
    "resnet18 learner snl 12900": (66.53, BCD),
    "resnet18 learner snl 24900": (70.05, BCD),
    "resnet18 learner snl 50000": (73.75, BCD),
    "resnet18 learner snl 100000": (75.94, BCD),
    "resnet18 deepreduce-teacher": (74.46, DEEP),
    "resnet18 S2+S3+S4": (76.22, DEEP),
    "resnet18 S2+S3": (75.51, DEEP),
    "resnet18 S2RT+S3RT+S4RT": (74.72, DEEP),
    "resnet18 S2RT+S3RT+S4RT-a0.5": (72.68, DEEP),
    "resnet18 S2RT+S3RT-a0.5": (69.50, DEEP),
    "resnet18 S2RT+S3RT+S4RT-r0.5": (68.68, DEEP),
    "resnet18 S2RT+S3RT-r0.5": (68.41, DEEP),
    "resnet18 S2RT+S3RT+S4RT-a0.5-r0.5": (65.36, DEEP),
    "resnet18 S2RT+S3RT-a0.5-r0.5": (64.97, DEEP),
    "resnet18 S2RT+S3RT+S4RT-a0.5-r0.5-one": (62.30, DEEP),
    "resnet18 NoReLUs": (18.34, DEEP),
    "resnet18 NoReLUs without KD": (18.49, DEEP),
    "resnet18 Conv1": (45.07, DEEP),
    "resnet18 Conv1 without KD": (46.22, DEEP),
    "resnet18 S1": (59.85, DEEP),
    "resnet18 S1 without KD": (61.93, DEEP),
    "resnet18 S2": (68.79, DEEP),
    "resnet18 S2 without KD": (67.63, DEEP),
    "resnet18 S3": (69.92, DEEP),
    "resnet18 S3 without KD": (67.41, DEEP),
    "resnet18 S4": (63.16, DEEP),
    "resnet18 S4 without KD": (58.90, DEEP),
    "resnet18 S2+S3+S4 without KD": (73.14, DEEP),
    "resnet18 S2RT+S3RT+S4RT without KD": (72.97, DEEP),
    "resnet18 S2+S3+S4-a0.5": (73.78, DEEP),
    "resnet18 S2+S3+S4-a0.5 without KD": (71.59, DEEP),
    "resnet18 S2+S3 without KD": (72.77, DEEP),
    "resnet18 S2RT+S3RT": (71.95, DEEP),
    "resnet18 S2RT+S3RT without KD": (70.97, DEEP),
    "resnet18 S2+S3-a0.5": (71.16, DEEP),
    "resnet18 S2+S3-a0.5 without KD": (69.54, DEEP),
    "resnet18 S3+S4": (73.16, DEEP),
    "resnet18 S3+S4 without KD": (68.40, DEEP),
    "resnet18 S3RT+S4RT": (71.06, DEEP),
    "resnet18 S3RT+S4RT without KD": (69.62, DEEP),
    "resnet18 S3+S4-a0.5": (70.29, DEEP),
    "resnet18 S3+S4-a0.5 without KD": (66.43, DEEP),
    "resnet18 S2RT+S3+S4RT": (74.80, DEEP),
    "resnet18 S2RT+S3+S4RT without KD": (71.70, DEEP),
    "resnet18 S2RT+S3RT-a0.5 without KD": (67.80, DEEP),
    "resnet18 S2RT+S3RT+S4RT-r0.5 without KD": (64.40, DEEP),
    "resnet18 S2RT+S3RT-r0.5 without KD": (66.00, DEEP),
    "resnet10 S1+S2+S3+S4-a0.5": (72.50, DEEP),
    "resnet10 S1+S2+S3+S4-a0.5 without KD": (71.30, DEEP),
    "resnet10 S1RT+S2RT+S3RT+S4RT-r0.5": (68.10, DEEP),
    "resnet10 S1RT+S2RT+S3RT+S4RT-r0.5 without KD": (64.70, DEEP),
    "resnet9 S1+S2+S3+S4-a0.5-r0.5": (66.20, DEEP),
    "resnet9 S1+S2+S3+S4-a0.5-r0.5 without KD": (62.60, DEEP),
}
CIFAR10: dict[str, tuple[float, str]] = {
    "resnet18 teacher": (95.2, SHALLOW),
    "resnet18 masked 82000": (93.05, SHALLOW),
    "resnet18 gated 82000": (93.05, SHALLOW),
    "resnet18 auxiliary 150000 final": (95.17, SHALLOW),
    "resnet18 auxiliary 150000 auxiliary": (94.51, SHALLOW),
}
PUBLISHED = {"cifar100": CIFAR100, "cifar10": CIFAR10}
"""Test accuracy in percent at full width, by data set and by what was run (see `networks`)."""


def networks(sweep: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(What it is, folder, row of the sweep) of every finished network; a grid of designs has several."""
    for row in json.loads((sweep / "sweep.json").read_text())["runs"]:
        folder = sweep / "runs" / row["run"]
        designs = sorted((folder / "designs").glob("*/model.json"))
        if designs:
            yield from ((design_name(path.parent), path.parent, row) for path in designs)
        elif row["state"] == "finished":
            axes = [str(row["axes"][axis]) for axis in AXES if axis in row["axes"]]
            yield " ".join([row["stage"], *axes]), folder, row


def design_name(folder: Path) -> str:
    """The name of a DeepReDuce design, with a mark if it was trained without distillation."""
    return folder.name + ("" if Run(folder).read_json("config.json").get("kd", True) else " without KD")


def judged(name: str, folder: Path, row: dict[str, Any], a: argparse.Namespace) -> dict[str, Any]:
    """Figures of one network, in float and in fixed point."""
    run = Run(folder)
    spec, network = load_network(run)
    data = load_data(run.config(), a.data_dir)
    found: dict[str, Any] = {"network": f"{spec.base} {name}", "data": data.name, "width": spec.width}
    found |= {"seed": run.config()["seed"], "test": len(data.test)}
    found |= figures(network, data, spec, Settings())
    known = PUBLISHED.get(data.name, {}).get(found["network"])
    if known is not None and spec.width == 1 and run.config().get("limit") is None:
        found["published"], found["source"] = known
    found |= {"seconds": row["seconds"], "attempts": row["attempts"]} if row["run"] == folder.name else {}
    return found | ({} if a.no_fixed else fixed(network, data))


def fixed(network: torch.nn.Module, data: Dataset) -> dict[str, Any]:
    """The clear fixed-point executor beside the float graph on the whole test set."""
    graph, program, weights = deploy(network, data)
    agreement, accuracy = clear_agreement(graph, program, weights, data.normalise(data.test.images), data.test.labels)
    error = {"max_abs_logit_error": agreement.max_abs_logit_error, "error_bound": program.error_bound}
    return {"fixed_accuracy": accuracy, "argmax_equal": agreement.argmax_equal} | error


def assets(sweep: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file of a network, by its place below the sweep."""
    files = sorted(path for path in folder.glob("model.*") if path.is_file())
    return {str(path.relative_to(sweep)): {"sha256": digest(path), "bytes": path.stat().st_size} for path in files}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(sweep: Path, stated: dict[str, dict[str, Any]]) -> int:
    """Say of each listed file whether it is there as it was; returns how many are not."""
    bad = 0
    for name, facts in stated.items():
        path = sweep / name
        state = "missing" if not path.exists() else "as listed" if digest(path) == facts["sha256"] else "another file"
        bad += state != "as listed"
        print(f"{state}: {name}")
    return bad


def trained_on(sweep: Path) -> dict[str, Any]:
    """Versions and machine of each run."""
    found = {folder.name: Run(folder).read_json("environment.json") for _, folder, _ in networks(sweep)}
    return {name: {key: value for key, value in facts.items() if key != "command"} for name, facts in found.items()}


def commands(sweep: Path) -> dict[str, list[str]]:
    """The command line of each run, with the sweep at runs/NAME and the data at .data."""
    found = {}
    for name, words in json.loads((sweep / "grid.json").read_text()).items():
        home = words[words.index("--out") + 1].removesuffix(f"/runs/{name}")
        moved = [word.replace(home, f"runs/{sweep.name}") for word in words]
        if "--data-dir" in moved:
            moved[moved.index("--data-dir") + 1] = ".data"
        found[name] = ["shoal", *moved]
    return found


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    said = f"{row['network']}: {row['accuracy']:.2f} %"
    said += f" (published {row['published']:.2f})" if "published" in row else ""
    said += f", fixed point {row['fixed_accuracy']:.2f} %" if "fixed_accuracy" in row else ""
    return f"{said}, {row['relus']:,} ReLUs, {row['macs']:,} MACs, depth {row['depth']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the folder of shoal sweep")
    parser.add_argument("--data-dir", type=Path, help="where the data lie now")
    parser.add_argument("--no-fixed", action="store_true", help="leave the fixed-point executor out")
    parser.add_argument("--check", type=Path, help="a result whose checksums to compare the files with")
    parser.add_argument("--made-by", default="", help="the sweep's command line, to be kept with the result")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    if a.check:
        sys.exit(min(1, check(a.sweep, json.loads(a.check.read_text())["assets"])))
    if a.out is None:
        parser.error("found neither --out nor --check; need one of them")
    rows, files = [], {}
    for name, folder, row in track(list(networks(a.sweep)), "judging networks"):
        rows.append(judged(name, folder, row, a))
        files |= assets(a.sweep, folder)
        print(line(rows[-1]), flush=True)
    body: dict[str, Any] = {"made_by": a.made_by, "environment": environment(), "trained_on": trained_on(a.sweep)}
    body |= {"commands": commands(a.sweep), "networks": rows, "assets": files}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
