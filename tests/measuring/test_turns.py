"""Turns: threads that alternate, and one that ends early."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from shoal.measuring.turns import Turns
from tests.support.waiting import HANG


def work(turns: Turns, number: int, steps: int, done: list[int]) -> None:
    """As a preparation does: the first batch is made at once, each further one in turn."""
    try:
        for step in range(steps):
            if step:
                assert turns.take(number)
                done.append(number)
            turns.end(number)
    finally:
        turns.leave(number)


@pytest.mark.parametrize("steps", [(4, 4), (4, 2), (0, 3), (1, 3, 3)])
def test_threads_alternate_and_one_that_ends_stops_nobody(steps: tuple[int, ...]) -> None:
    turns, done = Turns(len(steps)), list[int]()
    with ThreadPoolExecutor(len(steps)) as pool:
        working = [pool.submit(work, turns, number, count, done) for number, count in enumerate(steps)]
        for future in working:
            future.result(HANG)
    for number, count in enumerate(steps):
        assert done.count(number) == max(0, count - 1)
    fewest = min(count for count in steps if count > 1) - 1
    both = [number for number, count in enumerate(steps) if count > 1]
    assert all(sorted(done[i : i + len(both)]) == both for i in range(0, len(both) * fewest, len(both)))
