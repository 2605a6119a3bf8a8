"""OSAKD against the plain network, ONE and FFL-S at equal data, epochs and seeds; and the extra time of its step.

    python benchmarks/osakd.py --data fashion-mnist --seeds 0 1 2 --out benchmarks/results/osakd.json
    python benchmarks/osakd.py --methods osakd-8 dml --model resnet32 --epochs 30 --out osakd.json
    python benchmarks/osakd.py --methods --pairs 30 --out osakd_step.json          only the step's time

All of one seed begin with the same weights. The best epoch is chosen on the validation split; test accuracy is
reported, of methods with branches that of the first, and the mean over the branches, as the paper prints it. Finished
cells are read back, and a killed one goes on from its checkpoint in --work.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_overhead import alternate

from shoal.data import Dataset, load
from shoal.distill import Objective, cross_entropy
from shoal.lessons import Lesson, Problem, Teach
from shoal.models import build
from shoal.outputs import forward
from shoal.recipes import comparators, osakd
from shoal.run import Run, environment
from shoal.spec import Spec
from shoal.stages import Stages
from shoal.surgery import normalise
from shoal.teachers.neighbours import Neighbourhood, NeighbourTeacher, neighbours
from shoal.train import Schedule, Settings, evaluate

METHODS = ("baseline", "osakd-8", "osakd-16", "one", "ffl", "dml")
SCHEDULES = ("cosine", "paper")


def taught(name: str, a: argparse.Namespace) -> Teach:
    """A method's lesson; all online ones with two networks or branches, as the paper compares them."""
    if name == "baseline":
        return lambda problem: Lesson(problem.network(), (cross_entropy(),))
    if name.startswith("osakd-"):
        where = Neighbourhood(int(name.removeprefix("osakd-")), a.space, bank=a.bank)
        return osakd.teach(osakd.Options(where, a.loss, a.balance), osakd.paper())
    return comparators.teach(name, comparators.Options(branches=2))


def schedule(a: argparse.Namespace) -> Schedule:
    """The paper's constant rate, or a cosine that ends within a few epochs; the batch is the paper's in both."""
    if a.schedule == "paper":
        return replace(osakd.paper().schedule, epochs=a.epochs)
    return replace(osakd.quick().schedule, epochs=a.epochs)


def cell(name: str, seed: int, data: Dataset, a: argparse.Namespace) -> dict[str, Any]:
    """One network of one method, trained and measured."""
    spec = Spec(a.model, data.classes, data.shape, a.width)
    plan, settings = schedule(a), Settings(seed=seed, device=a.device, resume=True)
    run = Run(Path(a.work) / "-".join(str(v) for v in (*cells_of(settings_of(a)).values(), name, seed)))
    stages = Stages(data, settings, run)
    torch.manual_seed(seed)
    lesson = taught(name, a)(Problem(spec, plan, stages))
    history = stages.fit(
        "distill", lesson.model, Objective(lesson.terms), plan, hooks=lesson.hooks, settings={"exit": lesson.exit}
    )
    classifiers = evaluate(lesson.model, data, data.test, settings)
    branches = classifiers if name == "dml" else classifiers[:-1]
    row: dict[str, Any] = {"accuracy": classifiers[lesson.exit], "classifiers": classifiers}
    row |= {"branches": statistics.mean(branches)} if len(classifiers) > 1 else {}
    return row | {"validation": history.best, "best_epoch": history.best_epoch,
                  "seconds": sum(r["seconds"] for r in history.rows)}  # fmt: skip


def table(done: dict[str, Any]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds of every method, and what it gains on the baseline."""
    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for key, row in done.items():
        name, _, seed = key.rpartition("/")
        kinds.setdefault(name, {})[seed] = row
    plain = kinds.get("baseline", {})
    return {name: _summary(rows, plain) for name, rows in kinds.items()}


def _summary(rows: dict[str, dict[str, Any]], plain: dict[str, dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {"runs": len(rows)}
    for what in ("accuracy", "branches", "seconds"):
        values = [row[what] for row in rows.values() if what in row]
        if values:
            result |= {f"{what}_mean": statistics.mean(values), f"{what}_sd": _spread(values)}
    gains = [row["accuracy"] - plain[seed]["accuracy"] for seed, row in rows.items() if seed in plain]
    return result | ({"gain_mean": statistics.mean(gains), "gain_sd": _spread(gains)} if gains else {})


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def step_of(model: torch.nn.Module, x: Tensor, y: Tensor, objective: Objective) -> Callable[[], None]:
    """A whole optimiser step: forward pass, loss, backward pass, update."""
    optimiser = torch.optim.SGD(model.parameters(), 1e-3, 0.9)

    def step() -> None:
        loss, _ = objective(forward(model, x), None, y)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def extra(model: str, shape: tuple[int, ...], classes: int, batch: int, a: argparse.Namespace) -> dict[str, float]:
    """The time of an OSAKD step (k = 8, the mini-batch, or --bank) over a plain one, of one network."""
    torch.manual_seed(0)
    x = torch.randn(batch, *shape, device=a.device).to(memory_format=torch.channels_last)
    y = torch.randint(0, classes, (batch,), device=a.device)
    teacher = NeighbourTeacher(Neighbourhood(8, a.space, bank=a.bank), classes)
    sides = (Objective((cross_entropy(0.9), neighbours(teacher, 0.1, a.loss))), Objective((cross_entropy(),)))
    networks = [normalise(build(model, classes, channels=shape[0])).train().to(a.device) for _ in sides]
    networks = [network.to(memory_format=torch.channels_last) for network in networks]
    steps = [step_of(n, x, y, o) for n, o in zip(networks, sides, strict=True)]
    return alternate(steps[0], steps[1], a.pairs)


STEPS = {
    "osakd-cnn1, 3x32x32, batch 64": ("osakd-cnn1", (3, 32, 32), 10, 64),
    "osakd-cnn2, 1x28x28, batch 64": ("osakd-cnn2", (1, 28, 28), 10, 64),
    "resnet32-projection, 3x32x32, batch 128": ("resnet32-projection", (3, 32, 32), 10, 128),
}
"""The paper's networks at its batch sizes."""


def settings_of(a: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(a).items() if k not in ("work", "data_dir", "out")}


def cells_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Of all settings those that a cell's accuracy depends on."""
    return {k: v for k, v in settings.items() if k not in ("seeds", "methods", "threads", "device", "pairs")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--model", default="osakd-cnn2")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS[:-1]))
    parser.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--space", default="logits")
    parser.add_argument("--loss", default="mse-sum")
    parser.add_argument("--balance", type=float, default=0.9)
    parser.add_argument("--bank", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=0, help="timed pairs of steps; 0 for no timing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", default="runs/osakd")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    body = json.loads(a.out.read_text()) if a.out.exists() else {}
    done = body.setdefault("cells", {})
    if done and cells_of(body["settings"]) != cells_of(settings_of(a)):
        parser.error(f"found cells of other settings in {a.out}; need the same for one table; choose another --out")

    def write() -> None:
        body.update(settings=settings_of(a), environment=environment(), table=table(done))
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(body, indent=1) + "\n")

    for seed in a.seeds if a.methods else ():
        data = load(a.data, a.data_dir, seed=seed, limit=a.limit).to(a.device)
        for name in a.methods:
            if f"{name}/{seed}" not in done:
                done[f"{name}/{seed}"] = cell(name, seed, data, a)
                write()
                print(f"{name}/{seed}: {done[f'{name}/{seed}']['accuracy']:.2f} %", flush=True)
    if a.pairs:
        body["osakd_step_over_plain_step"] = {name: extra(*case, a) for name, case in STEPS.items()}
    write()
    print(json.dumps(body["table"] | body.get("osakd_step_over_plain_step", {}), indent=1))


if __name__ == "__main__":
    main()
