"""Sections of docs/gpu.md: steps in each way, and the papers' grids at small scale."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.result_tables import result, table
from benchmarks.training.steps import CASES


def steps() -> str:
    body = result("steps_cpu")
    given, machine = body["settings"], body["environment"]
    ways = list(next(iter(body["steps"].values())))
    head = ("steps a second", *ways, f"{ways[-1]} / eager", "share of the peak", "first steps, s", "an epoch, s")
    rows = []
    for name, row in body["steps"].items():
        last, epoch = row[ways[-1]], body["epochs"].get(name, {})
        took = " / ".join(f"{epoch[way]['seconds']:.1f}" for way in ways if way in epoch)
        shares = " / ".join(f"{row[way]['share_of_peak']:.0%}" for way in ways)
        rates = (f"{row[way]['steps_a_second']:.2f}" for way in ways)
        rows.append((name, *rates, f"{last['over_eager']:.2f}x", shares, f"{last['first_steps_s']:.0f}", took))
    command = f"python -m benchmarks.training.steps --width {given['width']:g} --batch {given['batch']} --seconds"
    command += f" {given['seconds']:g} --threads {given['threads']} --images {given['images']}"
    return f"""On a CPU, which has no graphs, at width {given["width"]:g}, batch {given["batch"]}, in
{given["precision"]}, with {given["threads"]} thread: `{command} --out benchmarks/results/steps_cpu.json`
({machine["processor"]}; epochs over {given["images"]:,} images)

{table(head, rows)}

{_missing(body)}What a GPU makes of them is **not measured**: neither steps a second nor an epoch's
seconds, nor the share of its peak."""


def _missing(body: dict[str, Any]) -> str:
    """Networks of the benchmark that the result does not hold."""
    left = [name for name in CASES if name not in body["steps"]]
    return f"Not compiled here in the time at hand, so not measured: {', '.join(left)}. " if left else ""


def paper() -> str:
    body = result("paper_small")
    rows = [(_name(row), *_figures(row)) for row in body["networks"]]
    head = ("", "test %", "fixed point, test %", "argmax equal", "ReLUs", "MACs", "depth")
    return f"""```
{_command(body)}
python -m benchmarks.training.paper_scale runs/small --out benchmarks/results/paper_small.json
```

{table(head, rows)}

CIFAR-100, {body["networks"][0]["test"]:,} test images, seed {body["networks"][0]["seed"]}. This shows that every
stage of the grid runs and how close fixed point comes; at this scale the accuracies say nothing of the papers', which
stay **not measured**."""


def _command(body: dict[str, Any]) -> str:
    return str(body["made_by"])


def _name(row: dict[str, Any]) -> str:
    return str(row["network"]).removeprefix("resnet18 ")


def _figures(row: dict[str, Any]) -> tuple[str, ...]:
    equal = f"{row['argmax_equal']:,} of {row['test']:,}"
    counts = (f"{row['relus']:,}", f"{row['macs']:,}", str(row["depth"]))
    return (f"{row['accuracy']:.2f}", f"{row['fixed_accuracy']:.2f}", equal, *counts)
