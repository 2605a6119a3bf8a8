"""Threshold search: the exact grid against counting, the other searches against the grid, goals by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ShoalError
from shoal.exits.evidence import Evidence
from shoal.exits.genetic import Genetic, decode
from shoal.exits.genetic import search as genetic_search
from shoal.exits.thresholds import METHODS, Goal, Grid, search, usual_method
from tests.support.tables import fast_first

PRICES = (3.0, 5.0, 8.0, 10.0)


def made(count: int, exits: int = 4, seed: int = 0) -> Evidence:
    """Exits that are right the oftener the surer and the deeper they are."""
    rng = np.random.default_rng(seed)
    ease = rng.beta(2, 1, size=(count, 1))
    depth = np.linspace(0.7, 1.0, exits)
    sure = np.clip(ease * depth + rng.normal(0, 0.08, (count, exits)), 0.05, 1)
    right = rng.random((count, exits)) < sure
    return Evidence(sure, right, right.sum(1) * 2 > exits)


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 4), st.integers(2, 5), st.booleans())
@settings(max_examples=25)
def test_the_grid_counts_every_combination(seed: int, count: int, exits: int, points: int, ensemble: bool) -> None:
    evidence = made(count, exits, seed)
    grid = Grid.of(evidence, PRICES[:exits], ensemble, points)
    for cell, thresholds in enumerate(product(*grid.levels)):
        truth = evidence.outcome(thresholds, PRICES[:exits], ensemble)
        assert grid.accuracy.ravel()[cell] == pytest.approx(truth.accuracy)
        assert grid.price.ravel()[cell] == pytest.approx(truth.price)
        assert tuple(grid.at(cell)) == thresholds


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_outcomes_are_algorithm_1_image_by_image(seed: int) -> None:
    evidence, rng = made(20, 3, seed), np.random.default_rng(seed)
    thresholds = rng.random(3)
    right, paid = 0, 0.0
    for sure, hit, together in zip(evidence.confidence, evidence.right, evidence.ensemble_right, strict=True):
        leaves = next((i for i in range(3) if sure[i] > thresholds[i]), None)
        right += int(together if leaves is None else hit[leaves])
        paid += PRICES[2 if leaves is None else leaves]
    accuracy, price = evidence.outcomes(thresholds[None], PRICES[:3], ensemble=True)
    assert (accuracy[0], price[0]) == pytest.approx((100 * right / 20, paid / 20))


GOALS = (Goal(9.0, 70.0), Goal(9.0, 70.0, beta=0.2), Goal(9.0, 70.0, budget=6.0), Goal(9.0, 70.0, loss=0.5))


def overconfident(count: int, exits: int) -> Evidence:
    """As trained networks are: the same order of images, most confidences above 0.99."""
    evidence = made(count, exits)
    return Evidence(1 - (1 - evidence.confidence) ** 4 / 10, evidence.right, evidence.ensemble_right)


@pytest.mark.parametrize("kind", fast_first([made, overconfident]))
@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("ensemble", fast_first([False, True]))
def test_ten_thousand_images_and_three_thresholds(
    kind: Callable[[int, int], Evidence], goal: Goal, ensemble: bool
) -> None:
    evidence = kind(10_000, 3 if ensemble else 4)
    prices = PRICES[: evidence.exits]
    goal = Goal(prices[-1], evidence.accuracies[-1], goal.budget, goal.loss, goal.beta)
    grid = search(evidence, prices, goal, ensemble=ensemble)
    for method in METHODS[1:]:
        found = search(evidence, prices, goal, method=method, ensemble=ensemble)
        assert found.fitness >= grid.fitness - 0.01 * abs(grid.fitness), method
        outcome = evidence.outcome(found.thresholds, prices, ensemble)
        assert (outcome.accuracy, outcome.price) == (found.accuracy, found.price)


def test_the_usual_method_looks_close_with_many_exits() -> None:
    evidence, prices = overconfident(2000, 7), tuple(range(10, 80, 10))
    goal = Goal(70.0, evidence.accuracies[-1], loss=0.0)
    assert search(evidence, prices, goal).fitness > search(evidence, prices, goal, method="grid").fitness
    assert (usual_method(4), usual_method(5)) == ("grid", "evolution")


def test_goals_by_hand() -> None:
    accuracy, price = np.array([70.0, 72.0, 68.0]), np.array([5.0, 10.0, 4.0])
    assert Goal(10.0, 71.0, beta=0.5).fitness(accuracy, price).tolist() == [1.5, 1.5, 1.0]
    assert Goal(10.0, 71.0, budget=5.0).fitness(accuracy, price).tolist() == [70.0, -200.0, 68.0]
    assert Goal(10.0, 71.0, loss=1.0).fitness(accuracy, price).tolist() == [2.0, 1.0, -2.0]


def test_the_front_falls_nowhere_and_nothing_beats_it() -> None:
    evidence = made(500, 3)
    grid = Grid.of(evidence, PRICES[:3], False, 12)
    front = grid.front()
    for cheap, dear in pairwise(front):
        assert cheap.price < dear.price
        assert cheap.accuracy < dear.accuracy
    for a, p in zip(grid.accuracy.ravel(), grid.price.ravel(), strict=True):
        assert any(f.accuracy >= a and f.price <= p for f in front)
    for f in front:
        outcome = evidence.outcome(f.thresholds, PRICES[:3])
        assert (outcome.accuracy, outcome.price) == pytest.approx((f.accuracy, f.price))


def test_genes_are_binary_numbers() -> None:
    genes = np.array([[0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]], dtype=bool)
    assert decode(genes, 3).tolist() == [[1 / 7, 1.0], [4 / 7, 0.0]]


def test_the_fittest_gene_is_never_lost() -> None:
    best: list[float] = []

    def fitness(thresholds: np.ndarray) -> np.ndarray:
        scores = -np.abs(thresholds - 0.3).sum(1)
        best.append(max([*best[-1:], scores.max()]))
        return scores

    for generations in (1, 5, 30):
        best.clear()
        found = genetic_search(fitness, 2, Genetic(population=20, generations=generations), seed=1)
        assert -np.abs(found - 0.3).sum() == pytest.approx(best[-1])
    assert best[-1] > -0.02


def test_a_seed_decides_the_search() -> None:
    evidence = made(300)
    goal = Goal(10.0, evidence.accuracies[-1])
    for method in METHODS:
        runs = [search(evidence, PRICES, goal, method=method, seed=s) for s in (3, 3)]
        assert runs[0] == runs[1]


def test_options_of_the_genetic_method_take_the_place_of_its_name() -> None:
    evidence = made(300)
    goal = Goal(10.0, evidence.accuracies[-1])
    named, by_options, hurried = (
        search(evidence, PRICES, goal, method=method, seed=3)
        for method in ("genetic", Genetic(), Genetic(population=2, generations=1, elite=1))
    )
    assert named == by_options
    assert hurried.fitness < named.fitness


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"method": "annealing"}, "method 'annealing'; need one of grid, genetic, evolution"),
        ({"method": ""}, "method ''; need one of"),
        ({"prices": PRICES[:2]}, "for 4 exits"),
        ({"goal": Goal(10.0, 70.0, budget=2.0)}, "found no thresholds that meet the goal.*need 2 or less"),
        ({"goal": Goal(10.0, 101.0, loss=0.0)}, r"need 101.00 % or more"),
    ],
)
def test_refused(change: dict[str, object], pattern: str) -> None:
    words = {"prices": PRICES, "goal": Goal(10.0, 70.0)} | change
    with pytest.raises(ShoalError, match=pattern):
        search(made(50), words.pop("prices"), words.pop("goal"), **words)


def test_numbers_without_a_meaning_are_refused() -> None:
    for make in (
        lambda: Goal(10.0, 70.0, budget=5.0, loss=1.0),
        lambda: Goal(10.0, 70.0, budget=0.0),
        lambda: Goal(0.0, 70.0),
        lambda: Genetic(population=0),
        lambda: Genetic(crossover=1.5),
        lambda: Genetic(elite=64),
        lambda: Genetic(bits=60),
        lambda: Grid.of(made(10), PRICES, False, 1000),
        lambda: Grid.of(made(10), PRICES, False, 1),
    ):
        with pytest.raises(ShoalError, match="need"):
            make()
