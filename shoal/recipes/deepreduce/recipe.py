"""DeepReDuce (Jha et al., ICML'21): measure criticality, train the grid by distillation, choose on the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from shoal.errors import ShoalError
from shoal.networks.spec import Spec
from shoal.recipes.deepreduce.front import Point, check_budget, choose, pareto, plot_front
from shoal.recipes.deepreduce.space import DesignSpace
from shoal.recipes.deepreduce.training import Preset, Teaching, Trainer
from shoal.recipes.stages import Stages, check_teacher
from shoal.storage.run import Run
from shoal.training.schedule import Schedule


def quick(teacher: int = 12, criticality: int = 4, design: int = 8, batch: int = 64) -> Preset:
    """Short cosine schedules for small data. Networks with the teacher's width start from its weights."""

    def cosine(epochs: int, lr: float) -> Schedule:
        return Schedule(epochs, lr, kind="cosine", warmup=0.5, batch_size=batch)

    plans = (cosine(teacher, 0.1), cosine(criticality, 0.05), cosine(design, 0.05))
    return Preset(*plans, student_from_teacher=True)


def paper() -> Preset:
    """Section 4 for CIFAR-100 and TinyImageNet: every network is trained from scratch for 120 epochs."""
    step = Schedule(120, 0.1, (30, 60, 90), weight_decay=4e-4)
    return Preset(step, step, step)


def paper_cifar10() -> Preset:
    """Section 4 for CIFAR-10: 150 epochs with a cosine schedule."""
    cosine = Schedule(150, 0.1, kind="cosine", weight_decay=4e-4)
    return Preset(cosine, cosine, cosine)


PRESETS: dict[str, Callable[[], Preset]] = {"quick": quick, "paper": paper, "paper-cifar10": paper_cifar10}


@dataclass(frozen=True)
class Options:
    """The most ReLUs of the chosen design (None: any number), and the designs to train (empty: the whole grid).

    A design is given by its place in the grid (``3``, ``2-5``, counted from 1) or by a name such as ``S2RT+S3-a0.5``
    (`Design.name`).
    """

    budget: int | None = None
    designs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """All trained designs, the baseline with the same number of epochs, and the design chosen by the budget."""

    points: tuple[Point, ...]
    baseline: Point
    chosen: Point


def reduce(
    spec: Spec,
    teacher: nn.Module,
    options: Options,
    preset: Preset,
    stages: Stages,
    teaching: Teaching | None = None,
) -> Result:
    """Train designs of `teacher` (the trained network of `spec`), each in its own run folder inside the stages' run.

    `teaching` says what they learn from; by default `teacher` teaches them. Writes `criticality.json`, `front.json` and
    `front.png`. Finished networks are loaded, not trained again. The front is that of all designs in the run, including
    those of earlier calls. Raises ShoalError for impossible options or without a run folder, and StoppedError when the
    time is up.
    """
    check_options(options, spec, teacher)
    space, run = DesignSpace(spec, teacher), stages.folder
    trainer = Trainer(space, preset, stages, teaching)
    wanted = space.wanted(options.designs, trainer.criticality)
    check_budget(options.budget, [planned.relus for planned in wanted])
    baseline = _point("baseline", trainer.baseline())
    for planned in wanted:
        trainer.design(planned)
    points = trained_points(run)
    _save_front(run, points, baseline)
    return Result(points, baseline, choose(points, options.budget))


def check_options(options: Options, spec: Spec, teacher: nn.Module) -> None:
    """Raise ShoalError, before any training, for a reduced teacher, impossible designs, or too small a budget."""
    check_teacher(spec)
    DesignSpace(spec, teacher).check(options.designs, options.budget)


def trained_points(run: Run) -> tuple[Point, ...]:
    """The designs that have been trained in `run`, by name. Raises ShoalError for a damaged figures.json."""
    folders = sorted(path.parent for path in (run.folder / "designs").glob("*/figures.json"))
    return tuple(_point(folder.name, Run(folder).read_json("figures.json")) for folder in folders)


def _point(name: str, body: Any) -> Point:
    body = body if isinstance(body, dict) else {}
    values = [body.get(key) for key in ("relus", "validation", "accuracy")]
    if not all(isinstance(value, (int, float)) for value in values):
        raise ShoalError(f"found no figures of {name}; need figures.json as shoal wrote it; delete it to train again")
    return Point(name, *values)


def _save_front(run: Run, points: Sequence[Point], baseline: Point) -> None:
    best = [point.name for point in pareto(points)]
    body = {"selected_on": "val", "baseline": baseline, "designs": points, "front": best}
    run.write_json("front.json", body | {"designs": [asdict(point) for point in points]})
    plot_front(points, baseline, run.folder / "front.png")
