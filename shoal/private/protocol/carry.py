"""The public shape of the circuit that finds a sign from two additive shares: which products of bits it needs.

Let x = u + v mod 2^(m+1) with abs(x) < 2^m. Its sign is u[m] ^ v[m] ^ c, where c is the carry out of the low m bits.
The low bits are cut into digits. A digit's generate and propagate bits are polynomials in bits that one party knows, so
one exchange gives them all; a gate then combines several digits in one more exchange:

    G = G[r-1] ^ P[r-1] (G[r-2] ^ P[r-2] ( ... G[0])),   P = P[r-1] ... P[0].

Up to 20 bits take two exchanges, more take three. No value lives here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

DIGIT, RADIX, MOST_SINGLE = 4, 4, 5
"""Bits of the widest digit, digits of a gate, and digits of a gate that stands alone."""
SINGLE_GATE_BITS = DIGIT * MOST_SINGLE
"""Up to so many bits one gate follows the digits."""


@dataclass(frozen=True)
class Digit:
    """Bits `low` to `low + width - 1`. A party's monomials are its products over each non-empty set of them.

    A set is a bit mask; monomial `s` stands at index ``s - 1``. `generate` and `propagate` list the pairs (client's
    set, server's set) whose products are summed. The full sets, which one party knows alone, are not among the pairs.
    """

    low: int
    width: int
    needs_propagate: bool

    @property
    def monomials(self) -> int:
        """How many products of its own bits each party has."""
        return (1 << self.width) - 1

    @cached_property
    def generate(self) -> tuple[tuple[int, int], ...]:
        """u[i] v[i] times (u[j] ^ v[j]) for each j above i: the upper sets go to one party or the other."""
        pairs = []
        for i in range(self.width):
            upper = [1 << j for j in range(i + 1, self.width)]
            for choice in range(1 << len(upper)):
                mine = sum(bit for at, bit in enumerate(upper) if choice >> at & 1)
                pairs.append((1 << i | mine, 1 << i | sum(upper) - mine))
        return tuple(pairs)

    @cached_property
    def propagate(self) -> tuple[tuple[int, int], ...]:
        """The product of u[j] ^ v[j] over all j, but for the two terms of one party alone."""
        full = self.monomials
        return tuple((s, full - s) for s in range(1, full)) if self.needs_propagate else ()


@dataclass(frozen=True)
class Gate:
    """Combines `size` (generate, propagate) pairs, the most significant last; one exchange.

    Opened inputs, in order: P[r-1] to P[1], G[0] to G[r-2], and P[0] where the gate's own propagate is needed.
    Its correlations are products of the masks a of these inputs, in blocks of planes. Block 0 holds the product over
    each set of the P's, set bit 0 standing for P[r-1]; set 0 is the constant 1. Each later block holds the first
    planes of block 0 times the mask of one more input: G[i] with the 2^(r-1-i) sets of the P's above it, P[0] with all.
    """

    size: int
    needs_propagate: bool

    @property
    def inputs(self) -> int:
        """How many bits it opens."""
        return 2 * (self.size - 1) + self.needs_propagate

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Planes of each block after block 0, in the order of the inputs that they belong to."""
        sizes = [1 << (self.size - 1 - i) for i in range(self.size - 1)]
        return tuple(sizes + [1 << (self.size - 1)] * self.needs_propagate)

    @property
    def base(self) -> int:
        """Planes of block 0, the constant among them."""
        return 1 << (self.size - 1)

    @property
    def products(self) -> int:
        """Planes that are no party's own random bits: the ANDs that making the gate's correlations takes."""
        return (self.base - self.size) + sum(size - 1 for size in self.blocks)


@dataclass(frozen=True)
class Carry:
    """The circuit for `bits` low bits (1 to 63). `levels` are the gates, exchange by exchange."""

    bits: int

    @cached_property
    def digits(self) -> tuple[Digit, ...]:
        """Least significant first; the wider ones are there, because the lowest needs no propagate bit."""
        count = -(-self.bits // DIGIT) if self.bits <= SINGLE_GATE_BITS else RADIX * RADIX
        widths = [self.bits // count + (i < self.bits % count) for i in range(count)]
        return tuple(Digit(sum(widths[:i]), w, i > 0) for i, w in enumerate(widths))

    @cached_property
    def levels(self) -> tuple[tuple[Gate, ...], ...]:
        """Gates of each exchange after the digits'; empty when one digit is all."""
        left, levels = len(self.digits), []
        while left > 1:
            radix = left if left <= MOST_SINGLE else RADIX
            left = -(-left // radix)
            levels.append(tuple(Gate(radix, i > 0) for i in range(left)))
        return tuple(levels)

    @property
    def monomials(self) -> int:
        """Planes that each party opens for the digits."""
        return sum(d.monomials for d in self.digits)

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(client's plane, server's plane) of every product of the digits: generate then propagate, digit by digit."""
        found, start = [], 0
        for digit in self.digits:
            found += [(start + s - 1, start + t - 1) for s, t in digit.generate + digit.propagate]
            start += digit.monomials
        return tuple(found)

    @property
    def products(self) -> int:
        """ANDs of random bits that one sign takes to prepare."""
        return len(self.pairs) + sum(gate.products for level in self.levels for gate in level)

    @property
    def exchanges(self) -> int:
        """Simultaneous exchanges that one layer of signs takes."""
        return 1 + len(self.levels)

    @property
    def opened(self) -> int:
        """Bits that each party sends for one sign."""
        return self.monomials + sum(gate.inputs for level in self.levels for gate in level)
