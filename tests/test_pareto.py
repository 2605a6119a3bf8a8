"""The Pareto front against its definition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.pareto import front

ROWS = st.integers(1, 4).flatmap(
    lambda columns: st.lists(st.tuples(*[st.integers(-3, 3).map(float)] * columns), max_size=24)
)


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


@given(ROWS)
def test_with_ties_the_front_is_what_no_other_row_dominates(rows: list[tuple[float, ...]]) -> None:
    wanted = [i for i, row in enumerate(rows) if not any(dominates(other, row) for other in rows)]
    assert front(rows, ties=True) == sorted(wanted, key=lambda i: (rows[i], i))


@given(ROWS)
def test_without_ties_the_first_of_equal_rows_stands_for_all(rows: list[tuple[float, ...]]) -> None:
    assert front(rows) == [i for i in front(rows, ties=True) if rows[i] not in rows[:i]]


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), max_size=24))
def test_a_constant_column_changes_nothing(rows: list[tuple[float, float]]) -> None:
    """Two columns have a way of their own, which must agree with that of any number."""
    for ties in (False, True):
        assert front([(*row, 1.0) for row in rows], ties=ties) == front(rows, ties=ties)


def test_infinite_costs_and_arrays_are_taken() -> None:
    rows = np.array([[np.inf, 0.0], [1.0, 1.0], [1.0, np.inf], [np.inf, np.inf]])
    assert front(rows) == [1, 0]
    assert front(np.empty((0, 2))) == []


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=30))
def test_the_best_within_a_budget_is_on_the_front(found: list[tuple[int, int]]) -> None:
    line = [found[i] for i in front([(cost, -accuracy) for cost, accuracy in found], ties=True)]
    for budget in range(13):
        within = [accuracy for cost, accuracy in found if cost <= budget]
        assert [accuracy for cost, accuracy in line if cost <= budget][-1:] == ([max(within)] if within else [])
