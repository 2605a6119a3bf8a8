"""What `shoal distill` does: check everything, then train a network as a method says, with its baseline beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from shoal.data.dataset import Dataset
from shoal.distillation.neighbours import Neighbourhood
from shoal.errors import ShoalError
from shoal.exits.classifiers import check_one_classifier
from shoal.jobs.inputs import Shared, check_network, load_data, longer, teacher_of
from shoal.networks.assembly import own_network
from shoal.networks.figures import figures
from shoal.networks.spec import Spec
from shoal.networks.stored import save_network
from shoal.progress import bars
from shoal.recipes import comparators, osakd
from shoal.recipes.lessons import Problem, Result, Teach, learn
from shoal.recipes.stages import Stages
from shoal.report import plot_curves
from shoal.storage.environment import environment
from shoal.storage.origins import began
from shoal.storage.run import Run
from shoal.training.evaluation import evaluate
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings

OSAKD = "osakd"
METHODS: dict[str, str] = {OSAKD: "its own outputs' nearest neighbours (OSAKD)"} | {
    name: method.summary for name, method in comparators.METHODS.items()
}
"""Every method by its name, with what teaches the network."""


@dataclass(frozen=True)
class Asked:
    """The command's own options; None and 0 are what was not said. `neighbours` are those of OSAKD alone."""

    method: str
    model: str
    data: str | None = None
    data_dir: Path | None = None
    width: float = 1.0
    resolution: float = 1.0
    limit: int | None = None
    seed: int | None = None
    replaced: tuple[str, ...] = ()
    preset: str = "quick"
    epochs: int | None = None
    teacher: Path | None = None
    assistant: str | None = None
    branches: int = 0
    neighbours: Mapping[str, Any] = field(default_factory=dict)


def distill(asked: Asked, shared: Shared) -> dict[str, Any]:
    """Train a network and its baseline into a run folder; the run's network is the taught one.

    With a teacher, data, seed and limit are those of its run.
    """
    _check(asked, shared)
    teacher, origin = _teacher(asked, shared)
    config = asdict(asked) | origin | {"command": "distill"}
    data = load_data(config, asked.data_dir, shared.device)
    spec = Spec(asked.model, data.classes, data.shape, asked.width, asked.resolution, replaced=asked.replaced)
    check_network(spec)
    check_one_classifier(own_network(spec), spec.base)
    settings = shared.settings(config["seed"])
    teach, schedule = _plan(asked, spec, data, teacher)
    if asked.assistant is None:  # one who must be trained first cannot be tried
        teach(Problem(spec, schedule, Stages(data, settings, None)))
    run = shared.run(began(config, data, asked.data_dir, teacher=teacher))
    with bars({}, other=schedule.epochs) as shown:
        result = learn(
            spec, teach, data, schedule, settings,
            run=run, listen=shown.listen, tensorboard=shared.tensorboard,
        )  # fmt: skip
    return _summarise(run, asked, result, data, settings, teacher)


def _check(asked: Asked, shared: Shared) -> None:
    if asked.method not in METHODS:
        raise ShoalError(f"found method {asked.method!r}; need one of {', '.join(METHODS)}; choose one")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ShoalError("found distill under torchrun; need one process; use torchrun for shoal train")
    shared.check()


def _teacher(asked: Asked, shared: Shared) -> tuple[nn.Module | None, dict[str, Any]]:
    """The teacher, if any, and the data's configuration: the teacher's run's, or what was asked for."""
    own = {"data": asked.data, "limit": asked.limit, "seed": asked.seed}
    if asked.teacher is None:
        if asked.data is None:
            raise ShoalError("found no --data and no --teacher; need one of them; name a data set, or a teacher's run")
        return None, own | {"data_dir": asked.data_dir, "seed": asked.seed or 0}
    said = [name for name, value in own.items() if value is not None]
    if said:
        raise ShoalError(
            f"found --{said[0]} beside --teacher; need the data, limit and seed of the teacher's run; leave it out"
        )
    _, network, origin = teacher_of(asked.teacher, shared)
    return network.to(shared.device), {name: origin.get(name) for name in ("data", "data_dir", "limit", "seed")}


def _plan(asked: Asked, spec: Spec, data: Dataset, teacher: nn.Module | None) -> tuple[Teach, Schedule]:
    """The method with its options, and its schedule. Raises ShoalError for options that it has no use for."""
    if asked.method != OSAKD:
        return _compared(asked, spec, teacher)
    odd = {"--teacher": teacher is not None, "--assistant": asked.assistant is not None, "--branches": asked.branches}
    for name, given in odd.items():
        if given:
            raise ShoalError(f"found {name} with method osakd; need none, a network is its own teacher; leave it out")
    preset = _preset(asked.preset, osakd.PRESETS)()
    choices = dict(asked.neighbours)
    others = {name: choices.pop(name) for name in ("loss", "balance") if name in choices}
    options = osakd.Options(Neighbourhood(**choices), **others)
    schedule = longer(preset.schedule, asked.epochs)
    osakd.check_options(options, data, schedule)
    return osakd.teach(options, preset), schedule


def _compared(asked: Asked, spec: Spec, teacher: nn.Module | None) -> tuple[Teach, Schedule]:
    if asked.neighbours:
        raise ShoalError(
            f"found {min(asked.neighbours)} with method {asked.method!r}, where it has no effect; need method osakd "
            "for it; leave it out"
        )
    assistant = replace(spec, base=asked.assistant) if asked.assistant else None
    if assistant is not None:
        check_network(assistant)
    options = comparators.Options(teacher, assistant, asked.branches)
    comparators.check_options(asked.method, options, spec)
    presets = {"quick": osakd.quick().schedule, "paper": comparators.METHODS[asked.method].schedule}
    schedule = longer(_preset(asked.preset, presets), asked.epochs)
    return comparators.teach(asked.method, options), schedule


def _preset(name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ShoalError(f"found preset {name!r}; need one of {', '.join(known)} for this method; choose one")
    return known[name]


def _summarise(
    run: Run, asked: Asked, result: Result, data: Dataset, settings: Settings, teacher: nn.Module | None
) -> dict[str, Any]:
    save_network(run, result.spec, result.model)
    save_network(run, result.spec, result.baseline, "baseline")
    accuracies = evaluate(result.whole, data, data.test, settings)
    summary: dict[str, Any] = {
        "data": data.name,
        "model": asked.model,
        "method": asked.method,
        "baseline": figures(result.baseline, data, result.spec, settings),
        "reduced": figures(result.model, data, result.spec, settings),
        "classifiers": accuracies,
        "validation": {name: history.best for name, history in result.histories.items()},
        "selected_on": settings.select,
        "environment": environment(),
        "seed": settings.seed,
    }
    if teacher is not None:
        summary["teacher"] = figures(teacher, data, result.spec, settings)
    run.write_json("summary.json", summary)
    plot_curves(run, run.folder / "curves.png")
    return summary
