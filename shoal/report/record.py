"""The checked contents of a run folder: figures of both networks, budget by site, training curves, settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import units
from shoal.errors import ShoalError
from shoal.storage.run import Run
from shoal.storage.summary import ALONE, FILE, Figures, Summary

Show = Callable[[float], str]

ROWS: tuple[tuple[str, str, Show], ...] = (
    ("accuracy", "test accuracy, %", units.percent),
    ("relus", "ReLUs", units.count),
    ("macs", "MACs", units.count),
    ("depth", "convolutions on the longest path", units.count),
    ("params", "parameters", units.count),
    ("prepared.offline_s", "private: offline, an item, s", units.seconds),
    ("prepared.offline_bytes", "private: offline, an item, MB", units.megabytes),
    ("prepared.online_s", "private: online, a query, s", units.seconds),
    ("prepared.bytes", "private: online, a query, MB", units.megabytes),
    ("prepared.messages", "private: messages online", units.count),
    ("prepared.max_abs_logit_error", "private: largest logit error", units.probability),
    ("plan.planned.seconds", "plan: forecast before training, s", units.seconds),
    ("plan.forecast.seconds", "plan: forecast after training, s", units.seconds),
    ("private.networks.none.online_s", "bench: online, no network, s", units.seconds),
    ("private.networks.lan.online_s", "bench: online, LAN, s", units.seconds),
    ("private.networks.wan.online_s", "bench: online, WAN, s", units.seconds),
)
"""(Path in the summary of a network, label with unit, how the value is shown). Private figures are for one image."""


def look_up(network: Mapping[str, object], path: str) -> float | None:
    """The figure of one network at a dotted path; None if it was not measured."""
    value: Any = network
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True)
class Sample:
    """Seconds of single queries: their number, the fastest and the slowest."""

    count: int
    fastest: float
    slowest: float


def sample(network: Mapping[str, object], path: str) -> Sample | None:
    """The queries whose median is the figure at `path`, such as ``prepared.online_s``; None if they are not stored."""
    place, _, name = path.rpartition(".")
    found: Any = look_up(network, f"{place}.samples_s") if name == "online_s" else None
    if not isinstance(found, (list, tuple)) or not found or not all(map(_finite, found)):
        return None
    return Sample(len(found), min(found), max(found))


SIDES = ("baseline", "reduced")


@dataclass(frozen=True)
class Site:
    """One ReLU site: the ReLUs that it has and those that it keeps (0 if its block was replaced)."""

    name: str
    relus: int
    kept: int
    replaced: bool


@dataclass(frozen=True)
class Record:
    """One finished run: its summary, settings, ReLU sites and training curves.

    A run of one network, such as a teacher, has the figures of a baseline only (`is_alone`). `curves` map each stage to
    points (epoch counted over all stages, validation accuracy in percent).
    """

    folder: Path
    summary: Summary
    settings: Mapping[str, Any]
    sites: tuple[Site, ...]
    curves: Mapping[str, tuple[tuple[int, float], ...]]

    @property
    def name(self) -> str:
        """The run's name in tables and plots: its folder as given."""
        return str(self.folder)

    @property
    def sides(self) -> tuple[str, ...]:
        """Those of `SIDES` that have figures."""
        return tuple(side for side in SIDES if self.summary.side(side))

    @property
    def is_alone(self) -> bool:
        """Whether the run has one network, and nothing to compare it with."""
        return len(self.sides) == 1


def read(folder: Path) -> Record | None:
    """The record of a run folder, or None when it has neither a summary nor the figures of a single network.

    Raises ShoalError when a file is damaged, does not belong to a run, or holds figures that are not finite.
    """
    run = Run(folder)
    if not run.has(FILE) and not run.has(ALONE):
        return None
    summary = Summary.read(run) if run.has(FILE) else Summary.alone(run)
    for side in SIDES:
        if side == "baseline" or run.has(FILE):  # a single network has no reduced one
            _check_figures(run, summary.side(side))
    settings = run.read_json("config.json") if run.has("config.json") else {}
    if not isinstance(settings, dict):
        raise _foreign(run, "config.json", "settings by name")
    return Record(folder, summary, settings, _sites(run, summary), _curves(run))


def _foreign(run: Run, name: str, what: str) -> ShoalError:
    return ShoalError(
        f"found no {what} in {run.folder / name}; need the file that shoal wrote; put it back or make the run again"
    )


def _check_figures(run: Run, network: Figures) -> None:
    for key, _, _ in ROWS:
        value = look_up(network, key)
        missing = value is None and key in ("accuracy", "relus", "macs")
        if missing or (value is not None and not _finite(value)):
            raise _foreign(run, FILE if run.has(FILE) else ALONE, f"finite number for {key!r}")


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _sites(run: Run, summary: Summary) -> tuple[Site, ...]:
    """The sites in `budget.json`; empty when the recipe has no budget."""
    if not run.has("budget.json"):
        return ()
    body = run.read_json("budget.json")
    counts: Any = body.get("counts") if isinstance(body, dict) else None
    sizes: Any = body.get("sizes") if isinstance(body, dict) else None
    if not (_whole(counts) and _whole(sizes)) or counts.keys() != sizes.keys():
        raise _foreign(run, "budget.json", "counts and sizes by site")
    replaced: object = summary.reduced.get("replaced_blocks", [])
    if not isinstance(replaced, list) or not all(isinstance(name, str) for name in replaced):
        raise _foreign(run, "summary.json", "list of names for 'replaced_blocks'")
    return tuple(Site(n, sizes[n], 0 if n in replaced else counts[n], n in replaced) for n in sizes)


def _whole(body: Any) -> bool:
    return isinstance(body, dict) and all(isinstance(value, int) for value in body.values())


def _curves(run: Run) -> dict[str, tuple[tuple[int, float], ...]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for i, row in enumerate(run.metrics()):
        if not _finite(row["accuracy"]):
            raise _foreign(run, "metrics.jsonl", "finite accuracy in every row")
        curves.setdefault(row["stage"], []).append((i + 1, row["accuracy"]))
    return {stage: tuple(points) for stage, points in curves.items()}
