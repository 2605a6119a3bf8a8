"""Networks as points: accuracy against costs, mean and spread over seeds, and Pareto fronts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.report.forecast import Online
from shoal.report.record import SIDES, Record, look_up

AXES = ("relus", "macs", "waits", "online_s")
"""Costs that accuracy is drawn against; each of them is better smaller."""

NOT_SETTINGS = ("seed", "teacher", "data_dir", "command")
"""What two runs of one configuration may differ in: the seed, where things lie, and how they were started."""


@dataclass(frozen=True)
class Point:
    """One network on the plots, or the mean over runs that differ by seed only.

    `costs` holds a value or None for each of `AXES`; `spread` is the sample standard deviation of the accuracy (None
    for one seed); `records` are the positions of its runs; `measured` says that the seconds were, in every run.
    """

    label: str
    side: str
    data: str
    accuracy: float
    spread: float | None
    costs: Mapping[str, float | None]
    seeds: tuple[int, ...]
    records: tuple[int, ...]
    measured: bool


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the (cost, accuracy) pairs that no other one dominates, by rising cost.

    A pair dominates another when its cost is not higher and its accuracy not lower, and one of the two is better.
    Equal pairs stand or fall together.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] > points[kept[-1]][1] or points[i] == points[kept[-1]]:
            kept.append(i)
    return kept


def fronts(points: Sequence[Point]) -> dict[str, dict[str, list[int]]]:
    """Positions in `points` on the front of every axis, by data set; points without the cost stay out."""
    found: dict[str, dict[str, list[int]]] = {}
    for data in sorted({p.data for p in points}):
        found[data] = {}
        for axis in AXES:
            known = [(i, cost) for i, p in enumerate(points) if p.data == data and (cost := p.costs[axis]) is not None]
            best = front([(cost, points[i].accuracy) for i, cost in known])
            found[data][axis] = [known[k][0] for k in best]
    return found


def points(records: Sequence[Record], onlines: Sequence[Mapping[str, Online]]) -> list[Point]:
    """Reduced networks and the baselines they came from; runs that differ by seed only are one point.

    `onlines` holds each record's forecasts by side, or nothing. A baseline that several runs share counts once.
    """
    return [point for side in SIDES for point in _points_of(side, records, onlines)]


def _points_of(side: str, records: Sequence[Record], onlines: Sequence[Mapping[str, Online]]) -> list[Point]:
    groups: dict[str, list[Point]] = {}
    for i, (record, online) in enumerate(zip(records, onlines, strict=True)):
        single, group = _single(i, record, side, online), groups.setdefault(_configuration(record, side), [])
        if side == "reduced" or all((p.seeds, p.accuracy) != (single.seeds, single.accuracy) for p in group):
            group.append(single)
    merged = [[_mean(g)] if len({p.seeds for p in g}) == len(g) else g for g in groups.values()]
    return [point for group in merged for point in group]


def _single(i: int, record: Record, side: str, online: Mapping[str, Online]) -> Point:
    figures, private = record.summary[side], online.get(side, Online())
    costs = {axis: look_up(figures, axis) for axis in ("relus", "macs")}
    costs |= {"waits": private.waits, "online_s": private.seconds}
    label = record.name if side == "reduced" else f"{record.summary['model']}, all ReLUs"
    place = (record.summary["data"], figures["accuracy"], None, costs, (record.summary["seed"],), (i,))
    return Point(label, side, *place, private.measured_s is not None)


def _configuration(record: Record, side: str) -> str:
    """What runs of one configuration share: data, network (told by its counts), and settings."""
    summary = record.summary
    counts = {k: summary["baseline"].get(k) for k in ("relus", "macs", "params", "depth")}
    settings = {k: v for k, v in record.settings.items() if k not in NOT_SETTINGS} if side == "reduced" else {}
    return json.dumps([summary["data"], summary["model"], counts, settings], sort_keys=True)


def _mean(group: Sequence[Point]) -> Point:
    """One point for runs of one configuration with a seed each."""
    if len(group) == 1:
        return group[0]
    first, accuracies = group[0], [p.accuracy for p in group]
    costs = {axis: _mean_cost([p.costs[axis] for p in group]) for axis in AXES}
    seeds, records = (tuple(sum((getattr(p, name) for p in group), ())) for name in ("seeds", "records"))
    place = (statistics.mean(accuracies), statistics.stdev(accuracies), costs, seeds, records)
    return Point(first.label, first.side, first.data, *place, all(p.measured for p in group))


def _mean_cost(costs: Sequence[float | None]) -> float | None:
    known = [cost for cost in costs if cost is not None]
    return statistics.mean(known) if len(known) == len(costs) else None


def as_json(point: Point) -> dict[str, Any]:
    """The point for the page's data."""
    return {**vars(point), "costs": dict(point.costs)}
