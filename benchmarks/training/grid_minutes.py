"""How many minutes the grids of the papers' tables would take on this machine: a forecast from single steps.

    python -m benchmarks.training.grid_minutes --out benchmarks/results/grid_minutes.json

Each distinct network of the grids does one step, forward, backward and update, after one that is not timed, and one
forward pass. Times are processor times of one thread, so waiting for other programs is not in them. Batches are small,
so that a step has about `--macs` multiply-adds; the update of the weights is timed alone, because it is done once for a
batch of any size. The minutes of a run follow from its epochs, images and batch size. Losses, augmentation, checkpoints
and the final test are left out. With `--grid`, only these grids are timed, and the result keeps the others. With
`--new`, networks that the result has already keep their times.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer.main
from torch import Tensor, nn

from benchmarks.training.grid_work import DATA, VALIDATION, Training, trainings
from shoal.cli.app import app
from shoal.cli.sweep import commands
from shoal.graph.counting import cost
from shoal.networks.assembly import assemble, own_network
from shoal.networks.spec import Spec
from shoal.storage.environment import environment
from shoal.surgery.tracing import trace
from shoal.sweep.grid import Planned, read_grid

GRIDS = Path(__file__).parents[2] / "examples" / "paper"
SHARED = "two trainings with low priority and tests ran on the same two cores"


def timed(work: Callable[[], Any]) -> float:
    """Processor seconds of `work`. With one thread, this is the time that it takes when nothing else runs."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def loss(outputs: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
    """The sum of the cross-entropies of all classifiers."""
    each = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return torch.stack([F.cross_entropy(logits, labels) for logits in each]).sum()


def measure(spec: Spec, macs: float) -> dict[str, float]:
    """Seconds for an image in training and in a forward pass, and seconds of an update of the weights."""
    torch.manual_seed(0)
    model: nn.Module = assemble(spec).train()
    total = cost(trace(own_network(spec), spec.shape))
    batch = max(2, min(32, round(macs / (total.macs + total.linear_macs))))
    x, y = torch.randn(batch, *spec.shape), torch.randint(0, spec.classes, (batch,))
    optimiser = torch.optim.SGD(model.parameters(), 1e-3, 0.9)

    def step() -> None:
        loss(model(x), y).backward()  # type: ignore[no-untyped-call]

    step()
    optimiser.step()
    train, update = timed(step) / batch, timed(optimiser.step)
    model.eval()
    with torch.no_grad():
        return {"batch": batch, "train_s": train, "update_s": update, "forward_s": timed(lambda: model(x)) / batch}


def seconds(training: Training, known: dict[Spec, dict[str, float]]) -> float:
    """Seconds of one training, from the times of its networks."""
    own, plan = known[training.spec], training.schedule
    *_, images, tests = DATA[training.data]
    trained = images * (1 - VALIDATION)
    teacher = 0.0 if training.teacher is None else known[training.teacher]["forward_s"]
    steps = math.ceil(trained / plan.batch_size) * own["update_s"]
    epoch = training.copies * (trained * own["train_s"] + steps) + trained * teacher
    epoch += (images - trained + tests * training.tests) * own["forward_s"]
    return plan.epochs * epoch


def stages(runs: tuple[Planned, ...], minutes: dict[str, float]) -> dict[str, Any]:
    """Each stage's number of runs, their minutes, and the stages that they need."""
    found: dict[str, Any] = {}
    by_name = {run.name: run for run in runs}
    for run in runs:
        row = found.setdefault(run.stage, {"runs": 0, "minutes": 0.0, "needs": []})
        row["runs"] += 1
        row["minutes"] += minutes[run.name]
        row["needs"] = sorted({*row["needs"], *(by_name[name].stage for name in run.needs)})
    return found


def label(spec: Spec) -> str:
    """A name for the network in the result."""
    size = "x".join(map(str, spec.shape))
    more = [f"width {spec.width:g}"] * (spec.width != 1) + [f"resolution {spec.resolution:g}"] * (spec.resolution != 1)
    more += [f"without {', '.join(spec.dropped_blocks)}"] * bool(spec.dropped_blocks)
    more += [f"{spec.exit_kind} exits {', '.join(spec.exits)}"] * bool(spec.exits)
    more += [f"widths {', '.join(f'{w:g}' for w in spec.widths)}"] * bool(spec.widths)
    return "; ".join([spec.base, size, f"{spec.classes} classes", *more])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--grid", action="append", help="name of a grid in examples/paper (repeatable); all if left out"
    )
    parser.add_argument("--new", action="store_true", help="time only networks that the result does not have yet")
    parser.add_argument("--macs", type=float, default=3e9, help="multiply-adds of the forward pass of a timed step")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"threads": 1, "macs": a.macs, "shared": SHARED}
    body: dict[str, Any] = {"settings": settings, "environment": environment(), "networks": {}, "grids": {}}
    body |= json.loads(a.out.read_text()) if a.out.exists() and (a.grid or a.new) else {}
    known: dict[Spec, dict[str, float]] = {}
    for path in sorted(GRIDS.glob("*.yaml")):
        if a.grid and path.stem not in a.grid:
            continue
        runs = read_grid(path, commands(typer.main.get_command(app)), Path("runs"))
        work = trainings(runs)
        every = [training for each in work.values() for training in each]
        for spec in dict.fromkeys(s for one in every for s in (one.spec, one.teacher) if s is not None):
            if a.new and label(spec) in body["networks"]:
                known[spec] = body["networks"][label(spec)]
            elif spec not in known:
                known[spec] = body["networks"][label(spec)] = measure(spec, a.macs)
        minutes = {name: sum(seconds(one, known) for one in each) / 60 for name, each in work.items()}
        body["grids"][path.stem] = stages(runs, minutes)
        a.out.write_text(json.dumps(body, indent=1) + "\n")
        print(path.stem, len(runs), f"{sum(minutes.values()):,.0f} minutes", flush=True)


if __name__ == "__main__":
    main()
