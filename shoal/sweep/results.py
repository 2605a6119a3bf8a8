"""Results of a sweep: a row per run, and mean and spread over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from shoal import units
from shoal.sweep.command import text
from shoal.sweep.engine import FINISHED, OVER, Record

SEED = "seed"
"""The axis over which results are averaged."""
SHOWN: dict[str, tuple[float, Callable[[float], str]]] = {
    "accuracy": (1, units.percent),
    "relus": (1, units.count),
    "macs": (1e6, lambda value: units.significant(value, 4)),
    "depth": (1, units.count),
    "seconds": (1, units.seconds),
}
"""Figures in the table, by name: unit, and how a value is shown. They are the reduced network's if there is one."""
TESTED = {
    "largest_on_test": "largest test accuracy of all epochs, selected on the test set",
    "last_on_test": "test accuracy after the last epoch",
}
"""Test accuracies of runs with --test-every-epoch, which stand below the table, and what they are."""
HEADS = ("runs of", "runs", "accuracy, %", "ReLUs", "MACs, millions", "depth", "seconds")
"""Headings of the table of `group_rows`."""


def flat(body: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in nested JSON by dotted path; lists, texts, booleans and the environment are left out."""
    found: dict[str, float] = {}
    for key, value in body.items():
        if isinstance(value, Mapping) and key != "environment":
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found


def headline(figures: Mapping[str, float | None], name: str) -> float | None:
    """A figure of the network that the run made: `reduced.<name>`, or `<name>` if nothing was reduced."""
    return figures.get(f"reduced.{name}", figures.get(name))


class RunRow(TypedDict):
    """One run: state, wall seconds, figures by dotted path, and the last lines of its log if it failed."""

    run: str
    stage: str
    axes: Mapping[str, object]
    folder: str
    state: str
    attempts: int
    seconds: float
    figures: dict[str, float]
    error: list[str]


class GroupRow(TypedDict):
    """Runs that differ only in their seed: mean and sample standard deviation of each figure."""

    stage: str
    axes: Mapping[str, object]
    seeds: list[object]
    runs: int
    mean: dict[str, float]
    sd: dict[str, float | None]


class Results(TypedDict):
    """`sweep.json`: all runs, all groups, and the names of the runs that did not finish."""

    runs: list[RunRow]
    groups: list[GroupRow]
    unfinished: list[str]


def row(record: Record) -> RunRow:
    """One run as JSON data."""
    run = record.run
    return RunRow(
        run=run.name,
        stage=run.stage,
        axes=dict(run.axes),
        folder=str(run.folder),
        state=record.state,
        attempts=record.attempts,
        seconds=record.seconds,
        figures=flat(record.result),
        error=record.error,
    )


def groups(records: Sequence[Record]) -> list[GroupRow]:
    """Groups of runs that differ only in their seed: mean and sample standard deviation (n - 1) of each figure.

    Only finished runs count; `seeds` lists theirs. The deviation of a single run is None.
    """
    cells: dict[str, list[Record]] = {}
    for record in records:
        axes = {axis: value for axis, value in record.run.axes.items() if axis != SEED}
        cells.setdefault(json.dumps([record.run.stage, axes], default=str), []).append(record)
    return [_group(cell) for cell in cells.values() if any(record.state == FINISHED for record in cell)]


def _group(cell: Sequence[Record]) -> GroupRow:
    finished = [record for record in cell if record.state == FINISHED]
    figures = [flat(record.result) | {"seconds": record.seconds} for record in finished]
    shared = [name for name in figures[0] if all(name in others for others in figures) and name != SEED]
    columns = {name: [row[name] for row in figures] for name in shared}
    run = finished[0].run
    return GroupRow(
        stage=run.stage,
        axes={axis: value for axis, value in run.axes.items() if axis != SEED},
        seeds=[record.run.axes[SEED] for record in finished if SEED in record.run.axes],
        runs=len(finished),
        mean={name: statistics.fmean(values) for name, values in columns.items()},
        sd={name: _deviation(values) for name, values in columns.items()},
    )


def _deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None for a single value, or if a value is not finite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def summary(records: Sequence[Record]) -> Results:
    """The content of `sweep.json`: rows, groups, and the names of the runs that did not finish."""
    return Results(
        runs=[row(record) for record in records],
        groups=groups(records),
        unfinished=[record.run.name for record in records if record.state != FINISHED],
    )


def group_rows(body: Results) -> list[list[str]]:
    """Rows of the final table, under HEADS: a group, its number of runs, and figures as mean and deviation."""
    return [[_title(group), str(group["runs"]), *(_cell(group, name) for name in SHOWN)] for group in body["groups"]]


def remarks_on_tests(body: Results) -> list[str]:
    """Lines with the largest and last test accuracies of the groups whose runs have them; mean and deviation."""
    known = [group for group in body["groups"] if headline(group["mean"], "largest_on_test") is not None]
    return [
        f"{what}, %: {'; '.join(f'{_title(group)}: {_cell(group, name)}' for group in known)}"
        for name, what in TESTED.items()
        if known
    ]


def _title(group: GroupRow) -> str:
    axes = ", ".join(f"{axis} {text(value)}" for axis, value in group["axes"].items())
    return ": ".join(filter(None, (group["stage"], axes)))


def _cell(group: Mapping[str, Any], name: str) -> str:
    """Mean and deviation of one figure, as the table shows them."""
    mean, deviation = headline(group["mean"], name), headline(group["sd"], name)
    if mean is None:
        return ""
    unit, show = SHOWN.get(name, SHOWN["accuracy"])
    mean, deviation = mean / unit, deviation / unit if deviation else None
    return units.spread(mean, deviation, show) if deviation else show(mean)


def is_over(record: Record) -> bool:
    """Whether the run does not change any more."""
    return record.state in OVER
