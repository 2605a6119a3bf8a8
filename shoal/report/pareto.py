"""Networks as points of accuracy against cost: mean and spread over seeds, and Pareto fronts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.pareto import front
from shoal.report.forecast import Online
from shoal.report.record import SIDES, Record, look_up

AXES = ("relus", "macs", "waits", "online_s")
"""Costs that accuracy is plotted against. For each, smaller is better."""

NOT_SETTINGS = ("seed", "teacher", "data_dir", "fingerprints", "command")
"""Settings in which two runs of one configuration may differ: the seed, folders, file fingerprints, the command
line."""


@dataclass(frozen=True)
class Point:
    """One network on the plots, or the mean over runs that differ only by seed.

    `costs` maps each of `AXES` to a value or None. `accuracy` is in percent; `spread` is its sample standard deviation
    (None for one seed). `records` are the indices of the runs. Seconds are measured if every run measured them
    (`measured`), else forecast if every run has a forecast. `images` is the number of test images, if it is known and
    the same for all runs.
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
    images: int | None = None


@dataclass(frozen=True)
class _Member:
    """The contribution of one run to a point."""

    record: int
    label: str
    seed: int
    figures: Mapping[str, Any]
    online: Online

    @property
    def known(self) -> tuple[bool, bool]:
        """Whether seconds are measured and forecast; runs that share a baseline may differ in this."""
        return self.online.measured_s is not None, self.online.forecast_s is not None


def fronts(points: Sequence[Point]) -> dict[str, dict[str, dict[str, list[int]]]]:
    """Indices in `points` of the Pareto fronts, by data set, axis and kind of cost (see `kind_of`).

    Costs of different kinds are never compared, so measured and forecast seconds have a front each. Points without that
    cost are left out.
    """
    return {data: {axis: _fronts(points, data, axis) for axis in AXES} for data in sorted({p.data for p in points})}


def _fronts(points: Sequence[Point], data: str, axis: str) -> dict[str, list[int]]:
    kinds: dict[str, list[tuple[int, float]]] = {}
    for i, point in enumerate(points):
        if point.data == data and (cost := point.costs[axis]) is not None:
            kinds.setdefault(kind_of(point, axis), []).append((i, cost))
    found = {}
    for kind, known in kinds.items():
        best = front([(cost, -points[i].accuracy) for i, cost in known], ties=True)
        found[kind] = [known[k][0] for k in best]
    return found


def kind_of(point: Point, axis: str) -> str:
    """How the cost of `point` on `axis` is known: ``counted``, or for seconds ``measured`` or ``forecast``."""
    if axis != "online_s":
        return "counted"
    return "measured" if point.measured else "forecast"


def points(records: Sequence[Record], onlines: Sequence[Mapping[str, Online]]) -> list[Point]:
    """Reduced networks and their baselines as points; runs that differ only by seed are one point.

    `onlines` holds the online phases of each record by side, or is empty for a record. A baseline shared by several
    runs counts once, also if one of them is the run of that network alone.
    """
    return [point for side in SIDES for point in _points_of(side, records, onlines)]


def _network(record: Record) -> tuple[object, ...]:
    """What a baseline is recognised by: data, name, counts, seed and accuracy."""
    own = record.summary.side("baseline")
    counts = (own.get(name) for name in ("relus", "macs", "params", "depth", "accuracy"))
    return record.summary.data, record.summary.model, record.summary.seed, *counts


def _points_of(side: str, records: Sequence[Record], onlines: Sequence[Mapping[str, Online]]) -> list[Point]:
    groups: dict[tuple[str, str], list[_Member]] = {}
    compared = {_network(record) for record in records if not record.is_alone}
    for i, (record, online) in enumerate(zip(records, onlines, strict=True)):
        if side not in record.sides or (record.is_alone and _network(record) in compared):
            continue
        place = (record.summary.data, _configuration(record, side))
        _join(groups.setdefault(place, []), _member(i, record, side, online), side)
    found = []
    for (data, _), group in groups.items():
        one_a_seed = len({member.seed for member in group}) == len(group)
        found += [_point(side, data, part) for part in ([group] if one_a_seed else [[m] for m in group])]
    return found


def _member(i: int, record: Record, side: str, online: Mapping[str, Online]) -> _Member:
    label = record.name if side == "reduced" or record.is_alone else f"{record.summary.model}, all ReLUs"
    return _Member(i, label, record.summary.seed, record.summary.side(side), online.get(side, Online()))


def _join(group: list[_Member], member: _Member, side: str) -> None:
    """Add a member to its group. A baseline that several runs share stays one member, with the most figures known."""
    identity = (member.seed, member.figures["accuracy"])
    same = [k for k, other in enumerate(group) if (other.seed, other.figures["accuracy"]) == identity]
    if side == "reduced" or not same:
        group.append(member)
    elif member.known > group[same[0]].known:
        group[same[0]] = member


def _configuration(record: Record, side: str) -> str:
    """What runs of one configuration have in common: data, network (identified by its counts), and settings."""
    summary = record.summary
    counts = {k: summary.side("baseline").get(k) for k in ("relus", "macs", "params", "depth")}
    settings = {k: v for k, v in record.settings.items() if k not in NOT_SETTINGS}
    if record.is_alone:
        pass
    elif side == "baseline":
        settings = {k: v for k, v in settings.items() if k.startswith("teacher_")}
    else:  # DeepReDuce's choices, which are not among its settings
        settings |= {k: getattr(summary, k) for k in ("design", "budget")}
    return json.dumps([summary.data, summary.model, counts, settings], sort_keys=True)


def _point(side: str, data: str, group: Sequence[_Member]) -> Point:
    """The mean over runs of one configuration, one per seed, or the figures of a single run."""
    measured = all(m.online.measured_s is not None for m in group)
    accuracies = [m.figures["accuracy"] for m in group]
    spread = statistics.stdev(accuracies) if len(group) > 1 else None
    costs = {axis: _mean_cost([look_up(m.figures, axis) for m in group]) for axis in ("relus", "macs")}
    costs["waits"] = _mean_cost([m.online.waits for m in group])
    # Measured and forecast seconds are never averaged with each other.
    costs["online_s"] = _mean_cost([m.online.measured_s if measured else m.online.forecast_s for m in group])
    places = (tuple(m.seed for m in group), tuple(m.record for m in group))
    images = {m.figures.get("test_images") for m in group}
    tested = images.pop() if len(images) == 1 else None
    return Point(_label(group), side, data, statistics.mean(accuracies), spread, costs, *places, measured, tested)


def _label(group: Sequence[_Member]) -> str:
    others = len(group) - 1
    return group[0].label + ("" if not others else " and another seed" if others == 1 else f" and {others} other seeds")


def _mean_cost(costs: Sequence[float | None]) -> float | None:
    known = [cost for cost in costs if cost is not None]
    return statistics.mean(known) if len(known) == len(costs) else None


def as_json(point: Point) -> dict[str, Any]:
    """The point as JSON data for the page."""
    return {**vars(point), "costs": dict(point.costs)}
