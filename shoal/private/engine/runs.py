"""How the work of the offline phase is divided into runs of SPU. This needs neither SPU nor JAX."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, starmap

from shoal.private.protocol.bitslice import WORD
from shoal.private.protocol.layout import Layout

MOST = 1 << 17
"""Most words of one run. A run costs 5 ms beside its words, so longer runs would save less than 1 % of the time, and
each doubling takes 150 MB or more at each party."""
REFILL = 10_500_000
"""Transfers that an instance of Ferret makes each way when it starts, and again whenever they are used up."""
REFILLS = 4
"""Refills that each instance of Ferret must be worth; they take about three times as long as the start of one."""


def pieces(length: int) -> Iterator[slice]:
    """As few pieces of at most `MOST` words as possible, of lengths that differ by one word at most; no padding."""
    count = -(-length // MOST)
    ends = [length * i // count for i in range(count + 1)]
    return starmap(slice, pairwise(ends))


def instances(layout: Layout, batch: int) -> int:
    """How many of Ferret's instances a batch of `batch` items is worth. SPU opens one for each of its threads.

    The start of an instance takes 2.3 s of a core, 1.5 MB and 0.2 GB at each party, and makes `REFILL` transfers each
    way. Another one never saves work. On idle cores it saves time, if each has several refills to make.
    """
    return max(1, batch * layout.word_ands * WORD // (REFILLS * REFILL))
