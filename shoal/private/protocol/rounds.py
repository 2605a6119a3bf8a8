"""Which products of a gate's masks can be made at the same time.

A product of k masks is the AND of a product of h masks and one of the other k - h, where h is the largest power of two
below k. So it is made in round ceil(log2 k), counted from 1, and each product takes one AND.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shoal.private.protocol.carry import Carry, Gate


@dataclass(frozen=True)
class Round:
    """ANDs that do not depend on each other: row `made[i]` of a table is ``row left[i] & row right[i]``.

    The table has the masks of all inputs of a carry circuit, gate by gate, then all products in stored order.
    """

    left: np.ndarray
    right: np.ndarray
    made: np.ndarray


@lru_cache(maxsize=128)
def rounds(carry: Carry) -> tuple[Round, ...]:
    """The rounds of all gates of `carry`; none if it has no gate."""
    gates = [gate for level in carry.levels for gate in level]
    found: dict[int, list[tuple[int, int, int]]] = {}
    masks, products = 0, sum(gate.inputs for gate in gates)
    for gate in gates:
        single, several = [1 << i for i in range(gate.inputs)], list(product_sets(gate))
        rows = {s: masks + i for i, s in enumerate(single)} | {s: products + i for i, s in enumerate(several)}
        for s in several:
            depth = (s.bit_count() - 1).bit_length()
            lower = _lowest(s, 1 << (depth - 1))
            found.setdefault(depth, []).append((rows[lower], rows[s ^ lower], rows[s]))
        masks, products = masks + gate.inputs, products + gate.products
    return tuple(Round(*np.array(found[depth], np.int64).T) for depth in sorted(found))


def product_sets(gate: Gate) -> Iterator[int]:
    """The sets of inputs, as bit masks, whose products a gate stores, in stored order (see `Gate`)."""
    yield from (s for s in range(1, gate.base) if s & (s - 1))
    for i, size in enumerate(gate.blocks):
        yield from (s | 1 << (gate.size - 1 + i) for s in range(1, size))


def _lowest(members: int, count: int) -> int:
    """The `count` lowest members of a set."""
    rest = members
    for _ in range(count):
        rest &= rest - 1
    return members ^ rest
