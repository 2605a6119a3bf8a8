"""The Pareto front of ReLUs against validation accuracy: which networks it holds, which a budget chooses, its plot."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ShoalError
from shoal.pareto import front
from shoal.storage.files import replacing


@dataclass(frozen=True)
class Point:
    """A trained network: ReLUs, accuracy in percent on the validation split and on the test set."""

    name: str
    relus: int
    validation: float
    test: float


def pareto(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other one beats, by rising ReLU count: all with fewer ReLUs validate worse.

    Of points with equal ReLUs and equal validation accuracy, the first by name.
    """
    named = sorted(points, key=lambda p: p.name)
    return tuple(named[i] for i in front([(p.relus, -p.validation) for p in named]))


def check_budget(budget: int | None, relus: Collection[int]) -> None:
    """Raise ShoalError unless one of the ReLU counts is at or below `budget`; None is no limit."""
    if budget is not None and budget < min(relus):
        raise ShoalError(
            f"found a budget of {budget:,} ReLUs; need {min(relus):,} or more, the least of these designs; "
            "raise it, or name smaller designs (--designs)"
        )


def choose(points: Sequence[Point], budget: int | None) -> Point:
    """The point on the front with most validation accuracy at or below `budget` ReLUs.

    Raises ShoalError, with the least count, when there is none.
    """
    check_budget(budget, [p.relus for p in points])
    return max((p for p in pareto(points) if budget is None or p.relus <= budget), key=lambda p: p.validation)


def plot_front(points: Sequence[Point], baseline: Point, path: Path) -> None:
    """Validation accuracy over ReLUs (logarithmic): all points, the front as a line with names, and the baseline."""
    from matplotlib.figure import Figure  # here, because it takes a while to load

    figure = Figure(figsize=(8.4, 5.0), layout="constrained")
    axes, best = figure.subplots(), pareto(points)
    rest = [p for p in points if p not in best]
    axes.scatter([p.relus for p in rest], [p.validation for p in rest], color="#9fb2c8", label="designs")
    axes.plot([p.relus for p in best], [p.validation for p in best], "o-", color="#1f5fa8", label="front")
    axes.scatter([baseline.relus], [baseline.validation], marker="s", color="#b5482f", label="all ReLUs")
    for i, point in enumerate(best):
        offset, side = ((6, -11), "left") if i % 2 else ((-6, 6), "right")
        place = (point.relus, point.validation)
        axes.annotate(point.name, place, xytext=offset, textcoords="offset points", ha=side, fontsize=7)
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.12)
    axes.set_xlabel("ReLUs (log scale)")
    axes.set_ylabel("validation accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=150, format="png")
