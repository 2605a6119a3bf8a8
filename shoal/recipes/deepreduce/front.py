"""The Pareto front of ReLUs against validation accuracy, the choice of a design by a ReLU budget, and a plot."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.canvas import BLUE, ORANGE, SKY, drawing, legend_below
from shoal.errors import ShoalError
from shoal.pareto import front


@dataclass(frozen=True)
class Point:
    """A trained network: its ReLU count, and its accuracy in percent on the validation split and the test set."""

    name: str
    relus: int
    validation: float
    test: float


def pareto(points: Sequence[Point]) -> tuple[Point, ...]:
    """The Pareto front, by rising ReLU count: no other point has as few ReLUs and as high an accuracy.

    Accuracy is that on the validation split. Of points that are equal in both, the first by name is kept.
    """
    named = sorted(points, key=lambda p: p.name)
    return tuple(named[i] for i in front([(p.relus, -p.validation) for p in named]))


def check_budget(budget: int | None, relus: Collection[int]) -> None:
    """Raise ShoalError unless at least one of the ReLU counts is at most `budget`; None means no limit."""
    if budget is not None and budget < min(relus):
        raise ShoalError(
            f"found a budget of {budget:,} ReLUs; need {min(relus):,} or more, the least of these designs; "
            "raise it, or name smaller designs (--designs)"
        )


def choose(points: Sequence[Point], budget: int | None) -> Point:
    """The point on the front with the highest validation accuracy and at most `budget` ReLUs (None: any number).

    Raises ShoalError, with the least ReLU count, when there is none.
    """
    check_budget(budget, [p.relus for p in points])
    return max((p for p in pareto(points) if budget is None or p.relus <= budget), key=lambda p: p.validation)


def plot_front(points: Sequence[Point], baseline: Point, path: Path) -> None:
    """Draw validation accuracy against ReLUs (log scale) to `path`: all points, the front with names, the baseline."""
    best = pareto(points)
    rest = [p for p in points if p not in best]
    with drawing(path, (9.0, 6.0)) as (axes,):
        axes.scatter(*_places(rest), color=SKY, label="other designs")
        axes.plot(*_places(best), "o-", color=BLUE, label="designs on the front")
        axes.scatter(*_places([baseline]), marker="s", s=60, color=ORANGE, label="all ReLUs")
        for point in best:  # names go above and to the left, where there are no points
            place = (point.relus, point.validation)
            axes.annotate(point.name, place, xytext=(-7, 5), textcoords="offset points", ha="right", fontsize=9)
        _scale_relus(axes, [p.relus for p in points])
        axes.margins(x=0.25, y=0.12)
        axes.set_xlabel("ReLUs (log scale)")
        axes.set_ylabel("validation accuracy, %")
        legend_below(axes)


def _places(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    return [p.relus for p in points], [p.validation for p in points]


def _scale_relus(axes: Any, relus: Sequence[int]) -> None:
    """Make the x-axis logarithmic. If a design has no ReLUs, it is linear below the fewest ReLUs of the others."""
    some = [count for count in relus if count]
    if len(some) == len(relus):
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=min(some, default=1))
