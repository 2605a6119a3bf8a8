"""Thresholds of dynamic inference: what is wanted of them, and three searches for them.

They are searched on validation images and reported on test images. Prices are what an image costs that leaves at each
exit: multiply-adds, or seconds that have been measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shoal.errors import ShoalError
from shoal.exits.evidence import Evidence, Floats
from shoal.exits.genetic import Genetic
from shoal.exits.genetic import search as genetic_search
from shoal.exits.inference import check_thresholds
from shoal.pareto import front
from shoal.storage.run import Run

CELLS = 2**21
"""The most combinations of thresholds that a grid holds: 17 MB for each array of them."""


@dataclass(frozen=True)
class Goal:
    """What makes thresholds good, given accuracy in percent and the mean price of an image. Higher is better.

    `full` is the price of the strongest classifier alone, and `baseline` its accuracy in percent. With `budget` (a
    price): the most accuracy at or below it. With `loss` (percentage points): the least price at an accuracy of at
    least `baseline` - `loss`. With neither: the paper's fitness (*Self-Distillation*, eq. 7), the acceleration ratio
    plus `beta` times the accuracy gained, in percentage points.
    """

    full: float
    baseline: float
    budget: float | None = None
    loss: float | None = None
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Raise ShoalError for two goals at once and for prices that are none."""
        if self.budget is not None and self.loss is not None:
            raise ShoalError("found a budget and an allowed loss; need one goal; leave one of them out")
        if not self.full > 0 or (self.budget is not None and not self.budget > 0):
            raise ShoalError(f"found a budget of {self.budget} and {self.full} in full; need positive prices")

    def fitness(self, accuracy: Floats, price: Floats) -> Floats:
        """Fitness of any number of outcomes, each above all that miss the budget or the accuracy.

        Those that miss are negative, and the more so the further they are off, which leads a search back.
        """
        if self.budget is not None:
            return np.where(price <= self.budget * (1 + 1e-9), accuracy, -100 * price / self.budget)
        if self.loss is not None:
            short = self.baseline - self.loss - accuracy
            return np.where(short <= 1e-9, self.full / price, -short)
        return self.full / price + self.beta * (accuracy - self.baseline)

    def fittest(self, accuracy: Floats, price: Floats) -> int:
        """The position of the fittest of any number of outcomes, in a flat array; of equal ones the first."""
        return int(np.argmax(self.fitness(accuracy, price)))


class Found(NamedTuple):
    """Thresholds with what they come to on the images that they were searched on."""

    thresholds: tuple[float, ...]
    accuracy: float
    price: float
    fitness: float


def search(
    evidence: Evidence,
    prices: Sequence[float],
    goal: Goal,
    *,
    method: str | None = None,
    ensemble: bool = False,
    seed: int = 0,
    genetic: Genetic | None = None,
) -> Found:
    """The best thresholds on `evidence` by one of `METHODS` (None: `usual_method`); leaving at exit i costs prices[i].

    One for each exit but the last, and with `ensemble` for the last one, too. The methods that do not try everything
    search among quantiles of each exit's confidences, most of which are close to 1 in a trained network. `seed` is of
    no use to the grid, which is exact on its levels; `genetic` is of use to that method alone. Raises ShoalError for an
    unknown method, and when no thresholds meet the goal.
    """
    count = evidence.exits if ensemble else evidence.exits - 1
    method = method or usual_method(count)
    _check(evidence, prices, method, genetic)
    ranked = np.sort(evidence.confidence[:, :count], axis=0)

    def fitness(shares: Floats) -> Floats:
        return goal.fitness(*evidence.outcomes(_at(ranked, shares), prices, ensemble))

    if method == "grid":
        best = Grid.of(evidence, prices, ensemble).best(goal)
    elif method == "genetic":
        best = _at(ranked, genetic_search(fitness, count, genetic or Genetic(), seed)[None])[0]
    else:
        best = _at(ranked, _evolve(fitness, count, seed)[None])[0]
    return _found(evidence, prices, goal, best, ensemble)


def usual_method(count: int) -> str:
    """The grid where it has 32 levels or more for each of `count` thresholds, else differential evolution."""
    return "grid" if 32**count <= CELLS else "evolution"


def _at(ranked: Floats, shares: Floats) -> Floats:
    """Thresholds [P, T]: a share of 0 lets all images leave, 1 none, and others that part stay; `ranked` is [N, T]."""
    places = np.ceil(shares * len(ranked)).astype(np.int64) - 1
    inner = np.take_along_axis(ranked, np.clip(places, 0, None), axis=0)
    return np.where(shares >= 1, 1.0, np.where(places < 0, 0.0, inner))


METHODS = ("grid", "genetic", "evolution")
"""All combinations of levels; Algorithm 2; scipy's differential evolution."""


def _check(evidence: Evidence, prices: Sequence[float], method: str, genetic: Genetic | None) -> None:
    if method not in METHODS:
        raise ShoalError(f"found method {method!r}; need one of {', '.join(METHODS)}; choose one")
    if genetic is not None and method != "genetic":
        raise ShoalError(f"found options of the genetic method with {method!r}; need that method; leave them out")
    if evidence.exits < 2 or len(prices) != evidence.exits or not all(p > 0 for p in prices):
        raise ShoalError(f"found prices {list(prices)} for {evidence.exits} exits; need two exits, a price > 0 each")


def _found(evidence: Evidence, prices: Sequence[float], goal: Goal, best: Floats, ensemble: bool) -> Found:
    accuracy, price = evidence.outcomes(best[None], prices, ensemble)
    fitness = float(goal.fitness(accuracy, price)[0])
    if fitness < 0 and (goal.budget is not None or goal.loss is not None):
        raise ShoalError(
            f"found no thresholds that meet the goal: the closest give {accuracy[0]:.2f} % at {price[0]:.4g} an image; "
            f"need {_wanted(goal)}; allow more, or train longer"
        )
    return Found(tuple(float(t) for t in best), float(accuracy[0]), float(price[0]), fitness)


def _wanted(goal: Goal) -> str:
    if goal.budget is not None:
        return f"{goal.budget:.4g} or less"
    return f"{goal.baseline - (goal.loss or 0):.2f} % or more"


def _evolve(fitness: Callable[[Floats], Floats], count: int, seed: int) -> Floats:
    """Differential evolution on [0, 1]^T, all of a generation at once."""
    from scipy.optimize import differential_evolution  # here, because it takes a while to load

    result = differential_evolution(
        lambda columns: -fitness(columns.T),
        [(0.0, 1.0)] * count,
        seed=seed,
        popsize=16,
        maxiter=60,
        tol=1e-8,
        polish=False,
        vectorized=True,
        updating="deferred",
    )
    return np.asarray(result.x)


class Grid(NamedTuple):
    """Every combination of `levels` (one array of thresholds an exit), its accuracy in percent and mean price.

    `accuracy` and `price` have one axis an exit that may be sure.
    """

    levels: tuple[Floats, ...]
    accuracy: Floats
    price: Floats

    @classmethod
    def of(cls, evidence: Evidence, prices: Sequence[float], ensemble: bool, points: int | None = None) -> Grid:
        """All combinations of `points` levels an exit (None: as many as `CELLS` allow, at most 512).

        Levels are quantiles of the exit's confidences, and 0 and 1. Each image falls into the cell of the levels
        that its confidences pass; running sums over these cells give all combinations at once, exactly. Raises
        ShoalError for more than `CELLS`.
        """
        count = evidence.exits if ensemble else evidence.exits - 1
        points = points or min(512, int(CELLS ** (1 / count) + 1e-9))
        if points < 2 or points**count > CELLS:
            raise ShoalError(
                f"found {points} levels for each of {count} thresholds; need 2 or more, and at most {CELLS:,} "
                "combinations; use --method genetic or evolution"
            )
        levels = tuple(_levels(evidence.confidence[:, i], points) for i in range(count))
        passed = [np.searchsorted(level, evidence.confidence[:, i], side="left") for i, level in enumerate(levels)]
        hits, paid = np.zeros((points,) * count), np.zeros((points,) * count)
        for i in range(count):
            left = _leaving(passed[: i + 1], points, (evidence.right[:, i], np.ones(len(evidence.right))))
            spread = (..., *[None] * (count - i - 1))
            hits += left[0][spread]
            paid += prices[i] * left[1][spread]
        stayed = _staying(passed, points, (evidence.last_right(ensemble), np.ones(len(evidence.right))))
        total = len(evidence.right)
        return cls(levels, 100 * (hits + stayed[0]) / total, (paid + prices[-1] * stayed[1]) / total)

    def best(self, goal: Goal) -> Floats:
        """The fittest thresholds [T]; of equals, the first in order."""
        return self.at(goal.fittest(self.accuracy, self.price))

    def at(self, cell: int) -> Floats:
        """The thresholds [T] of a cell, counted as in a flat array."""
        place = np.unravel_index(cell, self.accuracy.shape)
        return np.array([level[i] for level, i in zip(self.levels, place, strict=True)])

    def front(self) -> list[Found]:
        """The combinations that no other one beats, by rising price: all that are cheaper are less accurate.

        Their fitness is their accuracy.
        """
        accuracy, price = self.accuracy.ravel(), self.price.ravel()
        return [
            Found(tuple(float(t) for t in self.at(c)), float(accuracy[c]), float(price[c]), float(accuracy[c]))
            for c in front(np.stack([price, -accuracy], 1))
        ]


def _levels(confidence: Floats, points: int) -> Floats:
    inner = np.quantile(confidence, np.linspace(0, 1, points)[1:-1], method="lower")
    return np.concatenate(([0.0], inner, [1.0]))


def _histogram(passed: Sequence[np.ndarray], points: int, weight: np.ndarray) -> Floats:
    """Sums of `weight` [N] over cells: along each axis, how many levels an image's confidence passes, 0 to `points`."""
    shape = (points + 1,) * len(passed)
    cells = np.ravel_multi_index(tuple(passed), shape)
    return np.bincount(cells, weight, int(np.prod(shape))).astype(np.float64).reshape(shape)


def _leaving(passed: Sequence[np.ndarray], points: int, weights: Sequence[np.ndarray]) -> list[Floats]:
    """For all levels of the exits in `passed`: sums over the images that leave at the last of these."""
    sums = []
    for weight in weights:
        table = _histogram(passed, points, weight)
        for axis in range(len(passed) - 1):  # not sure at earlier exits: passed no more than level g
            table = np.cumsum(table, axis).take(range(points), axis)
        # sure here: passed more than g levels
        sums.append(np.flip(np.cumsum(np.flip(table, -1), -1), -1)[..., 1:])
    return sums


def _staying(passed: Sequence[np.ndarray], points: int, weights: Sequence[np.ndarray]) -> list[Floats]:
    """For all levels: sums over the images that no exit is sure of."""
    sums = []
    for weight in weights:
        table = _histogram(passed, points, weight)
        for axis in range(len(passed)):
            table = np.cumsum(table, axis).take(range(points), axis)
        sums.append(table)
    return sums


FILE = "thresholds.json"


def read_thresholds(run: Run, count: int) -> tuple[tuple[float, ...], bool]:
    """A run's thresholds for `count` exits, and whether the ensemble answers where none is sure.

    Raises ShoalError when there are none or they do not fit.
    """
    if not run.has(FILE):
        raise ShoalError(f"found no {FILE} in {run.folder}; need thresholds; search them with shoal exits")
    body = run.read_json(FILE)
    body = body if isinstance(body, dict) else {}
    thresholds, ensemble = body.get("thresholds"), body.get("ensemble")
    numbers = isinstance(thresholds, list) and all(isinstance(t, (int, float)) for t in thresholds)
    if thresholds is None or not numbers or not isinstance(ensemble, bool):
        raise ShoalError(
            f"found no usable thresholds in {run.folder / FILE}; need what shoal exits wrote; run it again"
        )
    check_thresholds(thresholds, count, ensemble)
    return tuple(thresholds), ensemble
