"""Sections of docs/gpu.md: the speed of each kind of training step, and the papers' grids at small scale."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.result_tables import result, table
from benchmarks.training.steps import CASES


def steps() -> str:
    body = result("steps_cpu")
    given, machine = body["settings"], body["environment"]
    ways = list(next(iter(body["steps"].values())))
    head = ("steps per second", *ways, f"{ways[-1]} / eager")
    head += ("fraction of peak speed", "first steps (s)", "one epoch (s)")
    rows = []
    for name, row in body["steps"].items():
        last, epoch = row[ways[-1]], body["epochs"].get(name, {})
        took = " / ".join(f"{epoch[way]['seconds']:.1f}" for way in ways if way in epoch)
        shares = " / ".join(f"{row[way]['share_of_peak']:.0%}" for way in ways)
        rates = (f"{row[way]['steps_a_second']:.2f}" for way in ways)
        rows.append((name, *rates, f"{last['over_eager']:.2f}x", shares, f"{last['first_steps_s']:.0f}", took))
    command = f"python -m benchmarks.training.steps --width {given['width']:g} --batch {given['batch']} --seconds"
    command += f" {given['seconds']:g} --threads {given['threads']} --images {given['images']}"
    return f"""On a CPU, which has no CUDA graphs, at width {given["width"]:g}, batch {given["batch"]}, in
{given["precision"]}, with {given["threads"]} thread: `{command} --out benchmarks/results/steps_cpu.json`
({machine["processor"]}; epochs over {given["images"]:,} images; two values are {" / ".join(ways)})

{table(head, rows)}

{_missing(body)}On a GPU nothing was measured: neither steps per second, nor seconds per epoch, nor the
fraction of the peak speed."""


def _missing(body: dict[str, Any]) -> str:
    """A sentence about the networks of the benchmark that the result does not have."""
    left = [name for name in CASES if name not in body["steps"]]
    return f"Not compiled in the time available, and so not measured: {', '.join(left)}. " if left else ""


def paper() -> str:
    body = result("paper_small")
    rows = [(_name(row), *_figures(row)) for row in body["networks"]]
    head = ("", "test accuracy (%)", "in fixed point (%)", "same class in both", "ReLUs", "MACs", "depth")
    return f"""```
{_command(body)}
python -m benchmarks.training.paper_scale runs/small --out benchmarks/results/paper_small.json
```

{table(head, rows)}

CIFAR-100, {body["networks"][0]["test"]:,} test images, seed {body["networks"][0]["seed"]}. The table
shows that every stage of the grid runs, and how close fixed point comes to floating point. At this scale the
accuracies say nothing about those at the papers' scale, which are **not measured**."""


def _command(body: dict[str, Any]) -> str:
    return str(body["made_by"])


def _name(row: dict[str, Any]) -> str:
    return str(row["network"]).removeprefix("resnet18 ")


def _figures(row: dict[str, Any]) -> tuple[str, ...]:
    equal = f"{row['argmax_equal']:,} of {row['test']:,}"
    counts = (f"{row['relus']:,}", f"{row['macs']:,}", str(row["depth"]))
    return (f"{row['accuracy']:.2f}", f"{row['fixed_accuracy']:.2f}", equal, *counts)
