"""Thresholds of dynamic inference: the goal of a search, and three search methods.

Thresholds are searched on validation images and reported on test images. The price of an exit is what an image costs
that leaves there: multiply-adds, or measured seconds.
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
"""Largest number of combinations of thresholds in a grid; each array over the grid takes 17 MB."""


@dataclass(frozen=True)
class Goal:
    """The goal of a search, as a fitness of accuracy (percent) and mean price per image. Higher is better.

    `full` is the price of the strongest classifier alone, and `baseline` its accuracy in percent. With `budget` (a
    price): the highest accuracy at a mean price of at most `budget`. With `loss` (percentage points): the lowest price
    at an accuracy of at least `baseline` - `loss`. With neither: the paper's fitness (*Self-Distillation*, eq. 7),
    which is the acceleration ratio plus `beta` times the accuracy gained, in percentage points.
    """

    full: float
    baseline: float
    budget: float | None = None
    loss: float | None = None
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Raise ShoalError for two goals at once and for prices that are not positive."""
        if self.budget is not None and self.loss is not None:
            raise ShoalError("found a budget and an allowed loss; need one goal; leave one of them out")
        if not self.full > 0 or (self.budget is not None and not self.budget > 0):
            raise ShoalError(f"found a budget of {self.budget} and a full price of {self.full}; need positive prices")

    def fitness(self, accuracy: Floats, price: Floats) -> Floats:
        """Fitness of outcomes of any shape. Outcomes that miss the budget or accuracy rank below all others.

        Their fitness is negative and falls with the distance from the goal, which leads a search back to it.
        """
        if self.budget is not None:
            return np.where(price <= self.budget * (1 + 1e-9), accuracy, -100 * price / self.budget)
        if self.loss is not None:
            short = self.baseline - self.loss - accuracy
            return np.where(short <= 1e-9, self.full / price, -short)
        return self.full / price + self.beta * (accuracy - self.baseline)

    def fittest(self, accuracy: Floats, price: Floats) -> int:
        """The position in the flat array of the fittest outcome; the first one among equals."""
        return int(np.argmax(self.fitness(accuracy, price)))


class Found(NamedTuple):
    """Thresholds, with their accuracy in percent, mean price and fitness on the images of the search."""

    thresholds: tuple[float, ...]
    accuracy: float
    price: float
    fitness: float


def search(
    evidence: Evidence,
    prices: Sequence[float],
    goal: Goal,
    *,
    method: str | Genetic | None = None,
    ensemble: bool = False,
    seed: int = 0,
) -> Found:
    """Search the thresholds that are best for `goal` on `evidence`; an image that leaves at exit i costs `prices[i]`.

    Returns one threshold for each exit except the last; with `ensemble`, one for the last exit, too. `method` is one
    of `METHODS`, or `Genetic` options for the genetic method; None selects `usual_method`. The grid is exact on its
    levels and does not use `seed`. The other methods search among quantiles of each exit's confidences, because most
    confidences of a trained network are close to 1.

    Raises ShoalError for an unknown method, when the prices do not fit the exits, and when no thresholds meet the goal.
    """
    count = evidence.exits if ensemble else evidence.exits - 1
    method = usual_method(count) if method is None else method
    _check(evidence, prices, method)
    ranked = np.sort(evidence.confidence[:, :count], axis=0)

    def fitness(shares: Floats) -> Floats:
        return goal.fitness(*evidence.outcomes(_at(ranked, shares), prices, ensemble))

    if method == "grid":
        best = Grid.of(evidence, prices, ensemble).best(goal)
    elif method == "evolution":
        best = _at(ranked, _evolve(fitness, count, seed)[None])[0]
    else:
        options = method if isinstance(method, Genetic) else Genetic()
        best = _at(ranked, genetic_search(fitness, count, options, seed)[None])[0]
    return _found(evidence, prices, goal, best, ensemble)


def usual_method(count: int) -> str:
    """The grid if it can have at least 32 levels for each of `count` thresholds, else differential evolution."""
    return "grid" if 32**count <= CELLS else "evolution"


def _at(ranked: Floats, shares: Floats) -> Floats:
    """Thresholds [P, T] from shares in [0, 1] and sorted confidences `ranked` [N, T].

    A share of 0 lets all images leave, a share of 1 lets none leave; otherwise that fraction of the images stays.
    """
    places = np.ceil(shares * len(ranked)).astype(np.int64) - 1
    inner = np.take_along_axis(ranked, np.clip(places, 0, None), axis=0)
    return np.where(shares >= 1, 1.0, np.where(places < 0, 0.0, inner))


METHODS = ("grid", "genetic", "evolution")
"""All combinations of levels; Algorithm 2 of the paper; scipy's differential evolution."""


def _check(evidence: Evidence, prices: Sequence[float], method: str | Genetic) -> None:
    if not isinstance(method, Genetic) and method not in METHODS:
        raise ShoalError(f"found method {method!r}; need one of {', '.join(METHODS)}; choose one")
    if evidence.exits < 2 or len(prices) != evidence.exits or not all(p > 0 for p in prices):
        raise ShoalError(
            f"found prices {list(prices)} for {evidence.exits} exits; need two or more, each with a price > 0"
        )


def _found(evidence: Evidence, prices: Sequence[float], goal: Goal, best: Floats, ensemble: bool) -> Found:
    accuracy, price = evidence.outcomes(best[None], prices, ensemble)
    fitness = float(goal.fitness(accuracy, price)[0])
    if fitness < 0 and (goal.budget is not None or goal.loss is not None):
        raise ShoalError(
            f"found no thresholds that meet the goal: the closest give {accuracy[0]:.2f} % at {price[0]:.4g} per "
            f"image; need {_wanted(goal)}; allow more, or train longer"
        )
    return Found(tuple(float(t) for t in best), float(accuracy[0]), float(price[0]), fitness)


def _wanted(goal: Goal) -> str:
    if goal.budget is not None:
        return f"{goal.budget:.4g} or less"
    return f"{goal.baseline - (goal.loss or 0):.2f} % or more"


def _evolve(fitness: Callable[[Floats], Floats], count: int, seed: int) -> Floats:
    """Differential evolution on [0, 1]^T, which evaluates a whole generation at once."""
    from scipy.optimize import differential_evolution  # imported here because it is slow to import

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
    """All combinations of `levels` (an array of thresholds for each exit), with accuracy in percent and mean price.

    `accuracy` and `price` have one axis for each exit that has a threshold.
    """

    levels: tuple[Floats, ...]
    accuracy: Floats
    price: Floats

    @classmethod
    def of(cls, evidence: Evidence, prices: Sequence[float], ensemble: bool, points: int | None = None) -> Grid:
        """All combinations of `points` levels per exit (None: as many as `CELLS` allows, at most 512).

        The levels are quantiles of the exit's confidences, plus 0 and 1. Each image is counted in the cell of the
        levels that its confidences exceed; cumulative sums over the cells then give all combinations exactly. Raises
        ShoalError for fewer than two levels or more than `CELLS` combinations.
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
        """The fittest thresholds [T]; the first ones among equals."""
        return self.at(goal.fittest(self.accuracy, self.price))

    def at(self, cell: int) -> Floats:
        """The thresholds [T] of a cell, given by its index in the flat array."""
        place = np.unravel_index(cell, self.accuracy.shape)
        return np.array([level[i] for level, i in zip(self.levels, place, strict=True)])

    def front(self) -> list[Found]:
        """The Pareto front of accuracy and price, by rising price. Each one's fitness is its accuracy."""
        accuracy, price = self.accuracy.ravel(), self.price.ravel()
        return [
            Found(tuple(float(t) for t in self.at(c)), float(accuracy[c]), float(price[c]), float(accuracy[c]))
            for c in front(np.stack([price, -accuracy], 1))
        ]


def _levels(confidence: Floats, points: int) -> Floats:
    inner = np.quantile(confidence, np.linspace(0, 1, points)[1:-1], method="lower")
    return np.concatenate(([0.0], inner, [1.0]))


def _histogram(passed: Sequence[np.ndarray], points: int, weight: np.ndarray) -> Floats:
    """Sums of `weight` [N] over cells: each axis is the number of levels that a confidence exceeds, 0 to `points`."""
    shape = (points + 1,) * len(passed)
    cells = np.ravel_multi_index(tuple(passed), shape)
    return np.bincount(cells, weight, int(np.prod(shape))).astype(np.float64).reshape(shape)


def _leaving(passed: Sequence[np.ndarray], points: int, weights: Sequence[np.ndarray]) -> list[Floats]:
    """Sums of each weight over the images that leave at the last exit in `passed`, for all levels of these exits."""
    sums = []
    for weight in weights:
        table = _histogram(passed, points, weight)
        for axis in range(len(passed) - 1):  # stays at earlier exits: exceeds at most g levels
            table = np.cumsum(table, axis).take(range(points), axis)
        # leaves here: exceeds more than g levels
        sums.append(np.flip(np.cumsum(np.flip(table, -1), -1), -1)[..., 1:])
    return sums


def _staying(passed: Sequence[np.ndarray], points: int, weights: Sequence[np.ndarray]) -> list[Floats]:
    """For all levels: sums of each weight over the images that leave at no exit."""
    sums = []
    for weight in weights:
        table = _histogram(passed, points, weight)
        for axis in range(len(passed)):
            table = np.cumsum(table, axis).take(range(points), axis)
        sums.append(table)
    return sums


FILE = "thresholds.json"


def read_thresholds(run: Run, count: int) -> tuple[tuple[float, ...], bool]:
    """A run's thresholds for `count` exits, and whether the ensemble answers where no exit is confident.

    Raises ShoalError when the run has no thresholds or they do not fit.
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
