"""The jobs of `shoal inplace` and `shoal anytime`: train all classifiers of a network, and evaluate each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from shoal.data.dataset import Dataset
from shoal.errors import ShoalError
from shoal.exits.anytime import (
    FAMILY,
    AnytimeRow,
    Budgeted,
    Macs,
    anytime_rows,
    budgeted,
    geometric_shares,
    macs,
    within,
)
from shoal.exits.evidence import Evidence, collect
from shoal.jobs.inputs import load_data, preset_of
from shoal.jobs.options import NewNetwork, Shared
from shoal.jobs.training import Job, prepare
from shoal.networks.spec import Spec
from shoal.networks.stored import WHOLE, load_whole, save_network
from shoal.recipes import inplace
from shoal.report import plot_anytime
from shoal.storage.origins import Config
from shoal.storage.run import Run
from shoal.storage.summary import Summary
from shoal.training.settings import Settings


@dataclass(frozen=True)
class Request(NewNetwork):
    """The options of `shoal inplace`: network, data and training."""

    preset: str = field(default="quick", metadata={"values": inplace.PRESETS})
    """Preset of training schedule and loss."""

    def config(self, options: inplace.Options) -> Config:
        """The settings that the run records."""
        return {"command": "inplace", **self.recorded(), "options": options}

    def schedules(self, options: inplace.Options) -> inplace.Preset:
        """The preset with the chosen schedule and number of epochs. Raises ShoalError for an unknown preset."""
        preset = preset_of(self.preset, inplace.PRESETS)(bool(options.widths))
        return replace(preset, schedule=self.scheduled(preset.schedule))


class BudgetRow(TypedDict, total=False):
    """Early exits by thresholds from the validation split. None is a threshold that no image reaches."""

    budget: float
    thresholds: list[float | None]
    validation_macs: float
    validation_accuracy: float
    macs: float
    accuracy: float
    shares: tuple[float, ...]


class Anytime(TypedDict, total=False):
    """The content of `anytime.json`: accuracy and cost of each classifier, and of early exits."""

    data: str
    model: str
    kind: str
    budgeted: list[BudgetRow]
    budgets: list[BudgetRow]
    anytime: list[AnytimeRow]


def train(request: Request, options: inplace.Options, shared: Shared) -> tuple[Summary, Anytime]:
    """Train a network into a run folder, which also gets a run folder for each classifier (`exits/1`, `widths/0.25`).

    Raises ShoalError, before anything is written, for impossible options or networks.
    """
    shared.check("inplace")
    preset = request.schedules(options)
    prepared = prepare(request.config(options), request.data_dir, shared)
    spec = request.spec(prepared.data)
    inplace.check_options(options, spec)
    job = prepared.fingerprinted().begin()
    with job.training({"inplace": preset.schedule.epochs}) as stages:
        result = inplace.train(spec, options, preset, stages)
    return _finish(job, result, options.method)


def _finish(job: Job, result: inplace.Result, method: str) -> tuple[Summary, Anytime]:
    """Save the network, and each classifier as a run, and write their figures."""
    _save(job.run, result)
    kind = "widths" if result.spec.widths else "exits"
    found = {
        name: job.part(f"{kind}/{name}", *own, result.history.on_test(i))
        for i, (name, own) in enumerate(result.parts.items())
    }
    worth = _evaluate(job.run, result.spec, result.model, (job.data, job.settings), ())
    strong, weak = list(found.values())[-1], next(iter(found.values()))
    summary = Summary(
        data=job.data.name,
        model=result.spec.base,
        seed=job.settings.seed,
        method=method,
        baseline=strong,
        reduced=weak,
        mean_accuracy=sum(figure["accuracy"] for figure in found.values()) / len(found),
        best_epoch=result.history.best_epoch,
        classifiers=found,
    )
    return job.finish(summary), worth


def _save(run: Run, result: inplace.Result) -> None:
    if not result.spec.widths:
        return save_network(run, result.spec, result.model)
    save_network(run, result.spec, result.model, WHOLE)
    save_network(run, *list(result.parts.values())[-1])


@dataclass(frozen=True)
class Evaluation:
    """The options of `shoal anytime`."""

    run: Path = field(metadata={"cli": "argument"})
    """A run folder of shoal inplace, or of any network with several exits."""
    budget: tuple[float, ...] = ()
    """Also show early exits with at most this many multiply-adds for an image on average, such as 30e6,60e6."""
    data_dir: Path | None = None
    """Folder with the files of the data set, laid out as published; the run's own if left out."""
    device: str = "cpu"
    """Device to compute on: cpu or cuda."""


def anytime(wanted: Evaluation) -> Anytime:
    """Evaluate every classifier of a run, and early exits; writes `anytime.json` and `anytime.png` into the run.

    Raises ShoalError for a run with one classifier, and for budgets below the multiply-adds of the first classifier.
    """
    run, settings = Run(wanted.run), Settings(device=wanted.device)
    settings.check()
    spec, model = load_whole(run)
    data = load_data(run.config(), wanted.data_dir, wanted.device)
    return _evaluate(run, spec, model, (data, settings), wanted.budget)


def _evaluate(
    run: Run, spec: Spec, model: nn.Module, on: tuple[Dataset, Settings], budgets: Sequence[float]
) -> Anytime:
    data, settings = on
    names = inplace.names(spec, model)
    if len(names) < 2:
        raise ShoalError(f"found one classifier at {run.folder}; need two or more; use a run of shoal inplace")
    cost, test = macs(model, spec.shape), collect(model, data, data.test, settings)
    body = Anytime(data=data.name, model=spec.base, kind="widths" if spec.widths else "exits")
    if len(data.val):
        validation = collect(model, data, data.val, settings)
        body["budgeted"] = _family(validation, test, cost)
        body["budgets"] = _within(budgets, validation, test, cost)
    elif budgets:
        raise ShoalError("found a budget and no validation split; need one for thresholds; leave the budget out")
    body["anytime"] = anytime_rows(names, test, cost)
    run.write_json("anytime.json", body)
    plot_anytime(f"{spec.base} on {data.name}", body["anytime"], body.get("budgeted", ()), run.folder / "anytime.png")
    return body


def _family(validation: Evidence, test: Evidence, cost: Macs) -> list[BudgetRow]:
    """Early exits for the published family of distributions of images over the exits."""
    shares = geometric_shares(torch.tensor(FAMILY), len(cost.in_order))
    return [_plain(row) for row in budgeted(validation, test, cost.in_order, shares)]


def _within(budgets: Sequence[float], validation: Evidence, test: Evidence, cost: Macs) -> list[BudgetRow]:
    """Early exits with the best thresholds for each budget."""
    rows = [(budget, within(budget, validation, test, cost.in_order)) for budget in budgets]
    return [{"budget": budget, **_plain(row)} for budget, row in rows]


def _plain(row: Budgeted) -> BudgetRow:
    """`row` without infinite thresholds, which JSON does not have.

    A threshold that no image reaches becomes None, and one that all images reach becomes 0. The last exit has none.
    """
    limits = [None if limit == math.inf else max(0.0, limit) for limit in row.thresholds[:-1]]
    return BudgetRow(
        thresholds=limits,
        validation_macs=row.validation_macs,
        validation_accuracy=row.validation_accuracy,
        macs=row.macs,
        accuracy=row.accuracy,
        shares=row.shares,
    )
