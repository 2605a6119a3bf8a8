"""The Pareto front of points with several costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Points = Sequence[Sequence[float]] | NDArray[np.float64]


def front(costs: Points, *, ties: bool = False) -> list[int]:
    """Indices of the rows of `costs` [N, D] that no other row dominates, in lexicographic order of the rows.

    Smaller is better in every column; negate a column where larger is better. A row dominates another if none of its
    costs is higher and at least one is lower. Of equal rows the first is kept, or all of them if `ties` is true.
    """
    if not len(costs):
        return []
    table = np.asarray(costs, dtype=np.float64)
    order = np.lexsort(table.T[::-1])
    table = table[order]
    fresh = np.concatenate(([True], (table[1:] != table[:-1]).any(1)))  # not equal to the row before
    rows, group = table[fresh], np.cumsum(fresh) - 1
    kept = _undominated(rows)[group]
    return [int(i) for i in order[kept if ties else kept & fresh]]


def _undominated(rows: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each row is not dominated, bool [N], for distinct `rows` in lexicographic order.

    In this order only an earlier row can dominate a row.
    """
    if rows.shape[1] == 2:  # the smallest second cost so far is enough; fast, for millions of rows
        least = np.minimum.accumulate(rows[:, 1])
        return np.concatenate(([True], rows[1:, 1] < least[:-1]))
    kept = np.zeros(len(rows), dtype=bool)
    for i, row in enumerate(rows):
        kept[i] = not (rows[kept] <= row).all(1).any()
    return kept
