"""When the wraps of exact truncations are exchanged.

Truncating a product in Z_2^m exactly gives shares of the result modulo 2^(m-f) at once. To get shares modulo 2^64 the
parties must learn whether their shares wrap, one bit for each value. Signs read only the low bits, so this bit can wait
for the next signs and travel in their first message. If another step reads the value first, the bits take an exchange
of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from shoal.private.program.steps import Step
from shoal.private.protocol.bitslice import bits_of, pack, spread

Names = tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """Names of exact truncations by where their wraps are exchanged.

    `rides`: in the first message of a relu step; `before`: in an exchange before a step; `reveal`: in one before an
    exit is revealed.
    """

    rides: dict[str, Names] = field(default_factory=dict)
    before: dict[str, Names] = field(default_factory=dict)
    reveal: dict[str, Names] = field(default_factory=dict)

    @property
    def alone(self) -> tuple[Names, ...]:
        """The groups of wraps that take an exchange of their own."""
        return (*self.before.values(), *self.reveal.values())


def schedule(
    steps: Iterable[Step], outputs: Names, exact: Mapping[str, int], fraction_bits: int, sign_bits: Mapping[str, int]
) -> Schedule:
    """The schedule of `steps` in the order in which they run. `exact` gives the ring bits of each exact truncation."""
    made, open_ = Schedule(), dict[str, set[str]]()
    for step in steps:
        waiting = {name for value in step.inputs for name in open_.get(value, ())} - _known(made)
        if step.op == "relu":
            fits = all(exact[name] - fraction_bits > sign_bits[step.name] for name in waiting)
            _note(made.rides if fits else made.before, step.name, waiting)
        elif step.op != "add":
            _note(made.before, step.name, waiting)
        else:
            open_[step.name] = waiting
        if step.name in exact:
            open_[step.name] = {step.name}
        if step.name in outputs:
            _note(made.reveal, step.name, open_.get(step.name, set()) - _known(made))
    return made


def _known(made: Schedule) -> set[str]:
    return {name for table in (made.rides, made.before, made.reveal) for names in table.values() for name in names}


def _note(table: dict[str, Names], key: str, names: set[str]) -> None:
    if names:
        table[key] = tuple(sorted(names))


class Lift:
    """One exact truncation between its product and the exchange of its wraps.

    For abs(y) < 2^(m-2), y + 2^(m-2) is below 2^(m-1), so its shares wrap exactly when one of them has its top bit set.
    With the client's top bit a and the server's top bit b that is a + b - a b. The product a b comes from a prepared
    product of random bits.
    """

    def __init__(self, words: np.ndarray, ring_bits: int, fraction_bits: int, client: bool) -> None:
        """`words` (uint64) are this party's share of y in Z_2^`ring_bits`."""
        self.client, self.count = client, words.size
        self.shift = np.uint64(ring_bits - fraction_bits)
        unused, offset = np.uint64(64 - ring_bits), 1 << (ring_bits - 2)
        # With the ring at the top of the words, the top bit is their sign and no mask is needed.
        low = words << unused
        if client:
            low += np.uint64(offset) << unused
        self.top = pack(low.view(np.int64) < 0)
        low >>= unused + np.uint64(fraction_bits)
        if client:
            low -= np.uint64(offset >> fraction_bits)
        self.low = low
        """The result's share modulo 2^(ring_bits - fraction_bits)."""
        self.mine = self.top
        self.correction: np.ndarray | None = None

    def mask(self, plane: np.ndarray) -> np.ndarray:
        """What this party opens: its top bits, masked by its prepared random bits."""
        self.mine = self.top ^ plane
        return self.mine

    def resolve(self, theirs: np.ndarray, product: np.ndarray) -> None:
        """From the other party's message, set `correction`: `low` plus it is a share modulo 2^64.

        Let p and q be the random bits that mask a and b, and e = a ^ p and g = b ^ q what was opened. Then
        a b = g a + e (b - g) + s p q with s = (1 - 2 e) (1 - 2 g). The client knows the first term, the server the
        second, and `product` is a share of p q.
        """
        known = self.top & ~theirs
        if not self.client:
            known |= theirs & self.mine
        flip = bits_of(self.mine ^ theirs, self.count)
        # (1 - 2 e) z is z or its complement plus 1; with that 1 goes what is known.
        out = product ^ spread(-flip)
        out += spread(flip - bits_of(known, self.count))
        out <<= self.shift
        self.correction = out
