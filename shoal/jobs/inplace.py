"""What `shoal inplace` and `shoal anytime` do: train all classifiers of a network, and say what each is worth."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.data.dataset import Dataset
from shoal.errors import ShoalError
from shoal.exits.anytime import (
    FAMILY,
    Budgeted,
    Macs,
    anytime_rows,
    budgeted,
    geometric_shares,
    macs,
    within,
)
from shoal.exits.evidence import Evidence, collect
from shoal.jobs.inputs import Shared, check_network, load_data, longer
from shoal.networks.figures import figures
from shoal.networks.spec import Spec
from shoal.networks.stored import WHOLE, load_whole, save_network
from shoal.progress import bars
from shoal.recipes import inplace
from shoal.report import plot_anytime, plot_curves
from shoal.storage.environment import environment
from shoal.storage.origins import began
from shoal.storage.run import Run
from shoal.training.settings import Settings


@dataclass(frozen=True)
class Asked:
    """What `shoal inplace` trains, on what, and how long."""

    model: str
    data: str
    data_dir: Path | None = None
    width: float = 1.0
    resolution: float = 1.0
    preset: str = "quick"
    epochs: int | None = None
    limit: int | None = None
    replaced: tuple[str, ...] = ()


def train(asked: Asked, options: inplace.Options, shared: Shared) -> dict[str, Any]:
    """Train into a run folder, with a run for each classifier below it (`exits/1`, `widths/0.25`)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ShoalError("found inplace under torchrun; need one process; use torchrun for shoal train")
    shared.check()
    preset = _preset(asked, bool(options.widths))
    config = {"command": "inplace", **asdict(asked), "seed": shared.seed, "options": options}
    data = load_data(config, asked.data_dir, shared.device)
    spec = Spec(asked.model, data.classes, data.shape, asked.width, asked.resolution, replaced=asked.replaced)
    check_network(spec)  # before anything is written
    inplace.check_options(options, spec)
    run, settings = shared.run(began(config, data, asked.data_dir)), shared.settings()
    with bars({"inplace": preset.schedule.epochs}) as shown:
        result = inplace.train(
            spec, data, options, preset, settings, run=run, listen=shown.listen, tensorboard=shared.tensorboard
        )
    return _finish(run, result, data, settings, options.method)


def _preset(asked: Asked, widths: bool) -> inplace.Preset:
    if asked.preset not in inplace.PRESETS:
        raise ShoalError(f"found preset {asked.preset!r}; need one of {', '.join(inplace.PRESETS)}; choose one")
    preset = inplace.PRESETS[asked.preset](widths)
    return replace(preset, schedule=longer(preset.schedule, asked.epochs))


def _finish(run: Run, result: inplace.Result, data: Dataset, settings: Settings, method: str) -> dict[str, Any]:
    """Save the network and each classifier as a run, and write what they are worth."""
    _save(run, result)
    found = {name: _part(run, name, *part, data, settings) for name, part in result.parts.items()}
    worth = _evaluate(run, result.spec, result.model, data, settings, ())
    ends = [found[name] for name in (list(found)[-1], next(iter(found)))]
    summary = {
        "data": data.name,
        "model": result.spec.base,
        "method": method,
        "baseline": ends[0],
        "reduced": ends[1],
        "mean_accuracy": sum(figure["accuracy"] for figure in found.values()) / len(found),
        "best_epoch": result.history.best_epoch,
        "classifiers": found,
        "environment": environment(),
        "seed": settings.seed,
    }
    run.write_json("summary.json", summary)
    plot_curves(run, run.folder / "curves.png")
    return summary | {"anytime": worth["anytime"]}


def _save(run: Run, result: inplace.Result) -> None:
    if not result.spec.widths:
        return save_network(run, result.spec, result.model)
    save_network(run, result.spec, result.model, WHOLE)
    save_network(run, *list(result.parts.values())[-1])


def _part(run: Run, name: str, spec: Spec, model: nn.Module, data: Dataset, settings: Settings) -> dict[str, Any]:
    """Make one classifier's network a run of its own, for shoal evaluate and compile; returns its figures."""
    own = run.below(f"{'widths' if spec.widths else 'exits'}/{name}")
    save_network(own, spec, model)
    return figures(model, data, spec, settings)


def anytime(folder: Path, budgets: Sequence[float], data_dir: Path | None, device: str) -> dict[str, Any]:
    """Evaluate every classifier of a run, and early exits; writes `anytime.json` and `anytime.png` into the run.

    Raises ShoalError for a run with one classifier, and for budgets below the first one's multiply-adds.
    """
    run, settings = Run(folder), Settings(device=device)
    settings.check()
    spec, model = load_whole(run)
    return _evaluate(run, spec, model, load_data(run.config(), data_dir, device), settings, budgets)


def _evaluate(
    run: Run, spec: Spec, model: nn.Module, data: Dataset, settings: Settings, budgets: Sequence[float]
) -> dict[str, Any]:
    names = inplace.names(spec, model)
    if len(names) < 2:
        raise ShoalError(f"found one classifier at {run.folder}; need two or more; use a run of shoal inplace")
    cost, test = macs(model, spec.shape), collect(model, data, data.test, settings)
    body: dict[str, Any] = {"data": data.name, "model": spec.base, "kind": "widths" if spec.widths else "exits"}
    rows = anytime_rows(names, test, cost)
    if len(data.val):
        body |= _budgeted(collect(model, data, data.val, settings), test, cost, budgets)
    elif budgets:
        raise ShoalError("found a budget and no validation split; need one for thresholds; leave the budget out")
    body["anytime"] = rows
    run.write_json("anytime.json", body)
    plot_anytime(f"{spec.base} on {data.name}", rows, body.get("budgeted", ()), run.folder / "anytime.png")
    return body


def _budgeted(validation: Evidence, test: Evidence, cost: Macs, budgets: Sequence[float]) -> dict[str, Any]:
    """The published family of exit shares, and the best thresholds for each budget."""
    shares = geometric_shares(torch.tensor(FAMILY), len(cost.in_order))
    family = budgeted(validation, test, cost.in_order, shares)
    chosen = [{"budget": budget} | _plain(within(budget, validation, test, cost.in_order)) for budget in budgets]
    return {"budgeted": [_plain(row) for row in family], "budgets": chosen}


def _plain(row: Budgeted) -> dict[str, Any]:
    """JSON has no infinity: a threshold that no image reaches is None, and one that all reach 0.

    The last exit, at which all leave, has none.
    """
    limits = [None if limit == math.inf else max(0.0, limit) for limit in row.thresholds[:-1]]
    return asdict(row) | {"thresholds": limits}
