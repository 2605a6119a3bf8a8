"""When the wraps of exact truncations are exchanged.

An exact truncation of a product in Z_2^m gives shares of the result modulo 2^(m-f) at once; to hold it modulo 2^64 the
parties must know whether their shares wrap, one bit a value. Signs read low bits only, so that bit can wait for the
next signs and go with their first message. Where something else reads the value first, it takes an exchange alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from shoal.private.program.steps import Step
from shoal.private.protocol.bitslice import pack, unpack

Names = tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """Exact truncations whose wraps are exchanged with a relu step's first message, before a step, at an exit."""

    rides: dict[str, Names] = field(default_factory=dict)
    before: dict[str, Names] = field(default_factory=dict)
    reveal: dict[str, Names] = field(default_factory=dict)

    @property
    def alone(self) -> tuple[Names, ...]:
        """What takes exchanges of its own."""
        return (*self.before.values(), *self.reveal.values())


def schedule(
    steps: Iterable[Step], outputs: Names, exact: Mapping[str, int], fraction_bits: int, sign_bits: Mapping[str, int]
) -> Schedule:
    """The schedule of `steps`, in the order in which they run; `exact` states each truncated product's ring."""
    plan, open_ = Schedule(), dict[str, set[str]]()
    for step in steps:
        waiting = {name for value in step.inputs for name in open_.get(value, ())} - _known(plan)
        if step.op == "relu":
            fits = all(exact[name] - fraction_bits > sign_bits[step.name] for name in waiting)
            _note(plan.rides if fits else plan.before, step.name, waiting)
        elif step.op != "add":
            _note(plan.before, step.name, waiting)
        else:
            open_[step.name] = waiting
        if step.name in exact:
            open_[step.name] = {step.name}
        if step.name in outputs:
            _note(plan.reveal, step.name, open_.get(step.name, set()) - _known(plan))
    return plan


def _known(plan: Schedule) -> set[str]:
    return {name for table in (plan.rides, plan.before, plan.reveal) for names in table.values() for name in names}


def _note(table: dict[str, Names], key: str, names: set[str]) -> None:
    if names:
        table[key] = tuple(sorted(names))


class Lift:
    """One exact truncation between its product and the exchange of its wraps.

    y + 2^(m-2) is below 2^(m-1) for abs(y) < 2^(m-2), so its shares wrap just when either has its top bit set: that is
    a + b - a b of the client's bit a and the server's b, and a b comes from the prepared product of random bits.
    """

    def __init__(self, words: np.ndarray, ring_bits: int, fraction_bits: int, client: bool) -> None:
        """`words` uint64 are this party's share of y in Z_2^`ring_bits`."""
        self.client, self.count = client, words.size
        self.shift = np.uint64(ring_bits - fraction_bits)
        f, offset = np.uint64(fraction_bits), np.uint64(client << (ring_bits - 2))
        flat = (words + offset) & np.uint64((1 << ring_bits) - 1)
        self.low = (flat >> f) - (offset >> f)
        """The result's share modulo 2^(ring_bits - fraction_bits)."""
        self.top = pack(flat >= np.uint64(1 << (ring_bits - 1)))
        self.mine = self.top
        self.correction: np.ndarray | None = None

    def mask(self, plane: np.ndarray) -> np.ndarray:
        """What this party opens: its top bits under its prepared random ones."""
        self.mine = self.top ^ plane
        return self.mine

    def resolve(self, theirs: np.ndarray, product: np.ndarray) -> None:
        """Set `correction`, which makes `low` a share modulo 2^64, from the other party's message.

        With p, q the random bits under a, b, and e, g what was opened of them: a b = g a + e (b - g) + s p q with
        s = (1 - 2 e) (1 - 2 g). The client knows the first term, the server the second, `product` is a share of p q.
        """
        known = self.top & ~theirs
        if not self.client:
            known |= theirs & self.mine
        flip = np.uint64(0) - unpack(self.mine ^ theirs, self.count)
        out = product ^ flip
        out -= flip
        out -= unpack(known, self.count)
        out <<= self.shift
        self.correction = out
