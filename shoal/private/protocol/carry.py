"""The public shape of the circuit that computes a sign from two additive shares: which products of bits it needs.

Let x = u + v mod 2^(m+1) with abs(x) < 2^m. Its sign is u[m] ^ v[m] ^ c, where c is the carry out of the low m bits.
The low bits are split into digits. A digit's generate and propagate bits are sums of products of two factors, one
known to each party, so one exchange gives all of them. A gate then combines several digits in one more exchange:

    G = G[r-1] ^ P[r-1] (G[r-2] ^ P[r-2] ( ... G[0])),   P = P[r-1] ... P[0].

Up to 20 bits take two exchanges, more bits three. This file holds no values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

DIGIT, RADIX, MOST_SINGLE = 4, 4, 5
"""Bits of the widest digit, digits that a gate combines, and digits that a single gate combines alone."""
SINGLE_GATE_BITS = DIGIT * MOST_SINGLE
"""Up to this many bits, a single gate follows the digits."""


@dataclass(frozen=True)
class Digit:
    """Bits `low` to `low + width - 1`. A party's monomials are the products of its bits over each non-empty set.

    A set is a bit mask; monomial `s` has index ``s - 1``. `generate` and `propagate` list the pairs (client's set,
    server's set) whose products are summed. The full sets are not among the pairs: one party knows their products.
    """

    low: int
    width: int
    needs_propagate: bool

    @property
    def monomials(self) -> int:
        """How many products of its own bits each party has for this digit."""
        return (1 << self.width) - 1

    @cached_property
    def generate(self) -> tuple[tuple[int, int], ...]:
        """u[i] v[i] times (u[j] ^ v[j]) for each j above i, multiplied out: each upper bit comes from either party."""
        pairs = []
        for i in range(self.width):
            upper = [1 << j for j in range(i + 1, self.width)]
            for choice in range(1 << len(upper)):
                mine = sum(bit for at, bit in enumerate(upper) if choice >> at & 1)
                pairs.append((1 << i | mine, 1 << i | sum(upper) - mine))
        return tuple(pairs)

    @cached_property
    def propagate(self) -> tuple[tuple[int, int], ...]:
        """The product of u[j] ^ v[j] over all j, multiplied out, without the two terms that one party knows alone."""
        full = self.monomials
        return tuple((s, full - s) for s in range(1, full)) if self.needs_propagate else ()


@dataclass(frozen=True)
class Gate:
    """Combines `size` (generate, propagate) pairs in one exchange; the most significant pair comes last.

    Inputs that are opened, in order: P[r-1] to P[1], G[0] to G[r-2], and P[0] if the gate's own propagate is needed.
    The gate's correlations are products of the masks of these inputs, in blocks of planes. Block 0 holds the product
    over each set of the P's, where bit 0 of the set stands for P[r-1], and set 0 is the constant 1. Each later block
    holds the first planes of block 0 times the mask of one more input: for G[i] the 2^(r-1-i) sets of the P's above
    it, for P[0] all sets.
    """

    size: int
    needs_propagate: bool

    @property
    def inputs(self) -> int:
        """How many bits the gate opens."""
        return 2 * (self.size - 1) + self.needs_propagate

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Planes of each block after block 0, in the order of their inputs."""
        sizes = [1 << (self.size - 1 - i) for i in range(self.size - 1)]
        return tuple(sizes + [1 << (self.size - 1)] * self.needs_propagate)

    @property
    def base(self) -> int:
        """Planes of block 0, including the constant."""
        return 1 << (self.size - 1)

    @property
    def products(self) -> int:
        """Planes that are not simply random bits: the ANDs needed to make the gate's correlations."""
        return (self.base - self.size) + sum(size - 1 for size in self.blocks)


@dataclass(frozen=True)
class Carry:
    """The circuit for `bits` low bits (1 to 63)."""

    bits: int

    @cached_property
    def digits(self) -> tuple[Digit, ...]:
        """Least significant first. The lowest digits are the wider ones, because digit 0 needs no propagate bit."""
        count = -(-self.bits // DIGIT) if self.bits <= SINGLE_GATE_BITS else RADIX * RADIX
        widths = [self.bits // count + (i < self.bits % count) for i in range(count)]
        return tuple(Digit(sum(widths[:i]), w, i > 0) for i, w in enumerate(widths))

    @cached_property
    def levels(self) -> tuple[tuple[Gate, ...], ...]:
        """The gates of each exchange after that of the digits; empty if there is only one digit."""
        left, levels = len(self.digits), []
        while left > 1:
            radix = left if left <= MOST_SINGLE else RADIX
            left = -(-left // radix)
            levels.append(tuple(Gate(radix, i > 0) for i in range(left)))
        return tuple(levels)

    @property
    def monomials(self) -> int:
        """How many planes each party opens for the digits."""
        return sum(d.monomials for d in self.digits)

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(client's plane, server's plane) of every product: digit by digit, generate before propagate."""
        found, start = [], 0
        for digit in self.digits:
            found += [(start + s - 1, start + t - 1) for s, t in digit.generate + digit.propagate]
            start += digit.monomials
        return tuple(found)

    @property
    def products(self) -> int:
        """ANDs of random bits needed to prepare one sign."""
        return len(self.pairs) + sum(gate.products for level in self.levels for gate in level)

    @property
    def exchanges(self) -> int:
        """Simultaneous exchanges for one layer of signs."""
        return 1 + len(self.levels)

    @property
    def opened(self) -> int:
        """Bits that each party sends for one sign."""
        return self.monomials + sum(gate.inputs for level in self.levels for gate in level)
