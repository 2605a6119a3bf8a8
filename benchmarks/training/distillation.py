"""The papers' ways of teaching a network by itself, against plain training, at equal data, epochs and seeds.

    python -m benchmarks.training.distillation osakd --out benchmarks/results/osakd_fashion_mnist.json
    python -m benchmarks.training.distillation self --model resnet10 --width 0.25 --epochs 12 --out self.json
    python -m benchmarks.training.distillation inplace --widths 0.25 0.5 0.75 1 --model resnet10 --out inplace.json

All of one seed begin with the same weights. The best epoch is chosen on the validation split (`inplace`: by the mean
over the classifiers); test accuracy is reported, that of the classifier that is deployed, and of every other one.
Finished cells are read back, and a killed one goes on from its checkpoint in --work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.superclasses import with_superclasses
from shoal.data.dataset import Dataset
from shoal.data.loading import load
from shoal.distillation.neighbours import Neighbourhood
from shoal.exits.classifiers import count_exits
from shoal.exits.points import exit_points
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.recipes import comparators, inplace, osakd, self_distill
from shoal.recipes.lessons import Lesson, Problem, Teach
from shoal.recipes.stages import Stages
from shoal.storage.environment import environment
from shoal.storage.run import Run
from shoal.training.evaluation import evaluate
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings

Methods = dict[str, Callable[[argparse.Namespace], Teach]]


def plain(a: argparse.Namespace) -> Teach:
    """The network by cross-entropy alone."""
    return lambda problem: Lesson(problem.network(), (cross_entropy(),))


def neighbours(k: int) -> Callable[[argparse.Namespace], Teach]:
    """OSAKD with `k` neighbours in the mini-batch, or in it and --bank outputs before it."""

    def made(a: argparse.Namespace) -> Teach:
        where = Neighbourhood(k, a.space, bank=a.bank)
        return osakd.teach(osakd.Options(where, a.loss, a.balance), osakd.paper())

    return made


def peers(name: str) -> Callable[[argparse.Namespace], Teach]:
    """An online method with two networks or branches, as OSAKD's paper compares them."""
    return lambda a: comparators.teach(name, comparators.Options(branches=2))


def own_exits(**loss: Any) -> Callable[[argparse.Namespace], Teach]:
    """Classifiers with attention where the network halves its maps, by the quick preset with its loss changed."""

    def made(a: argparse.Namespace) -> Teach:
        preset = replace(self_distill.quick(a.epochs), **loss)

        def lesson(problem: Problem) -> Lesson:
            base = problem.network()
            after = exit_points(base, problem.spec.shape, "downsample", None)
            spec = replace(problem.spec, exits=after, exit_kind="attention")
            return Lesson(*self_distill.taught_network(spec, base, preset))  # adapters do not change the logits

        return lesson

    return made


def public_loss(a: argparse.Namespace) -> Teach:
    """As `own_exits`, with the loss of the paper's public code (its `reference-code` preset)."""
    public = self_distill.reference_code()
    names = ("alpha", "feature_weight", "temperature", "squared", "mean", "distance", "adapters", "skipped", "release")
    return own_exits(**{name: getattr(public, name) for name in names})(a)


def flexible(method: str) -> Callable[[argparse.Namespace], Teach]:
    """All widths, or all exits, trained at once by one of in-place distillation's methods."""

    def made(a: argparse.Namespace) -> Teach:
        preset = inplace.quick(bool(a.widths))

        def lesson(problem: Problem) -> Lesson:
            base = problem.network()
            own = a.widths or count_exits(base) > 1
            exits = () if own else exit_points(base, problem.spec.shape, "downsample", None)
            options = inplace.Options(method, tuple(a.widths or ()), exits)
            spec = options.spec(problem.spec)
            model = assemble(spec, base)
            count = len(inplace.names(spec, model))
            terms = inplace.objective(method, count, preset.weight, preset.temperature).terms
            return Lesson(model, terms, exit=None)

        return lesson

    return made


STUDIES: dict[str, Methods] = {
    "osakd": {
        "baseline": plain,
        "osakd-8": neighbours(8),
        "osakd-16": neighbours(16),
        "one": peers("one"),
        "ffl": peers("ffl"),
        "dml": peers("dml"),
    },
    "self": {
        "baseline": plain,
        "deep-supervision": own_exits(alpha=0.0, feature_weight=0.0),
        "self-distillation": own_exits(),
        "self-distillation-paper": own_exits(alpha=0.6, squared=True),
        "self-distillation-public": public_loss,
    },
    "inplace": {"baseline": plain} | {name: flexible(name) for name in inplace.METHODS},
}


def schedule(a: argparse.Namespace) -> Schedule:
    """The paper's constant rate (OSAKD), or a cosine that ends within a few epochs."""
    if a.schedule == "paper":
        return replace(osakd.paper().schedule, epochs=a.epochs)
    found = osakd.quick() if a.study == "osakd" else self_distill.quick(a.epochs)
    return replace(found.schedule, epochs=a.epochs)


def cell(name: str, seed: int, data: Dataset, a: argparse.Namespace) -> dict[str, Any]:
    """One network of one method, trained and measured."""
    spec = Spec(a.model, data.classes, data.shape, a.width, a.resolution)
    plan, settings = schedule(a), Settings(seed=seed, device=a.device, resume=True)
    run = Run(Path(a.work) / f"{fingerprint(a)}-{name}-{seed}")
    stages = Stages(data, settings, run)
    torch.manual_seed(seed)
    lesson = STUDIES[a.study][name](a)(Problem(spec, plan, stages))
    history = stages.fit(
        "distill", lesson.model, Objective(lesson.terms), plan, hooks=lesson.hooks, settings={"exit": lesson.exit}
    )
    found = evaluate(lesson.model, data, data.test, settings)
    row = {"accuracy": found[-1 if lesson.exit is None else lesson.exit], "classifiers": found}
    row |= {"mean": statistics.mean(_members(a.study, name, found))}
    return row | {"validation": history.best, "best_epoch": history.best_epoch,
                  "seconds": sum(r["seconds"] for r in history.rows)}  # fmt: skip


def _members(study: str, name: str, classifiers: list[float]) -> list[float]:
    """Those that a paper averages: branches without their ensemble, or all."""
    return classifiers[:-1] if name in ("one", "ffl") else classifiers


def table(done: dict[str, Any]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds of every method, and what it gains on the baseline."""
    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for key, row in done.items():
        name, _, seed = key.rpartition("/")
        kinds.setdefault(name, {})[seed] = row
    return {name: _summary(rows, kinds.get("baseline", {})) for name, rows in kinds.items()}


def _summary(rows: dict[str, dict[str, Any]], baseline: dict[str, dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {"runs": len(rows)}
    for what in ("accuracy", "mean", "seconds"):
        result |= _moments(what, [row[what] for row in rows.values()])
    columns = zip(*(row["classifiers"] for row in rows.values()), strict=True)
    result["classifiers"] = [_moments("accuracy", list(values)) for values in columns]
    gains = [row["accuracy"] - baseline[seed]["accuracy"] for seed, row in rows.items() if seed in baseline]
    return result | (_moments("gain", gains) if gains else {})


def _moments(name: str, values: list[float]) -> dict[str, float | None]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {f"{name}_mean": statistics.mean(values), f"{name}_sd": spread}


def cells_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Of all settings those that a cell's accuracy depends on."""
    same = {k: v for k, v in settings.items() if k not in ("seeds", "methods", "threads", "device")}
    return {k: v for k, v in same.items() if k != "superclasses" or v}  # results from before this option stay valid


def settings_of(a: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(a).items() if k not in ("work", "data_dir", "out")}


def fingerprint(a: argparse.Namespace) -> str:
    """Cells of other settings go to other folders."""
    return hashlib.sha256(json.dumps(cells_of(settings_of(a))).encode()).hexdigest()[:12]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir")
    parser.add_argument("--superclasses", action="store_true", help="of CIFAR-100: 20 labels instead of 100")
    parser.add_argument("--model", default="osakd-cnn2")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--resolution", type=float, default=1.0)
    parser.add_argument("--widths", type=float, nargs="+", help="inplace: of a slimmable network; exits if left out")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="some of the study's")
    parser.add_argument("--schedule", choices=("cosine", "paper"), default="cosine")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--space", default="logits")
    parser.add_argument("--loss", default="mse-sum")
    parser.add_argument("--balance", type=float, default=0.9)
    parser.add_argument("--bank", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", default="runs/distillation")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    a.methods = a.methods or [name for name in STUDIES[a.study] if name != "dml"]
    unknown = [name for name in a.methods if name not in STUDIES[a.study]]
    if unknown:
        parser.error(f"found methods {unknown}; need some of {', '.join(STUDIES[a.study])}")
    return a


def main() -> None:
    a = parse()
    torch.set_num_threads(a.threads)
    settings = settings_of(a)
    body = json.loads(a.out.read_text()) if a.out.exists() else {}
    done = body.setdefault("cells", {})
    if done and cells_of(body["settings"]) != cells_of(settings):
        raise SystemExit(f"found cells of other settings in {a.out}; need the same for one table; choose another --out")
    for seed in a.seeds:
        data = load(a.data, a.data_dir, seed=seed, limit=a.limit).to(a.device)
        data = with_superclasses(data) if a.superclasses else data
        for name in a.methods:
            if f"{name}/{seed}" in done:
                continue
            done[f"{name}/{seed}"] = cell(name, seed, data, a)
            print(f"{name}/{seed}: {done[f'{name}/{seed}']['accuracy']:.2f} %", flush=True)
            body.update(settings=settings, environment=environment(), table=table(done))
            a.out.parent.mkdir(parents=True, exist_ok=True)
            a.out.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(body["table"], indent=1))


if __name__ == "__main__":
    main()
