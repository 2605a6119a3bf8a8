"""Signs and ReLUs of shared values from prepared correlations. Both parties call the same functions.

A value is the xor of its boolean shares or the sum mod 2^64 of its arithmetic shares. Counts are for n values, in
planes of W = ceil(n / 64) words. `shoal.private.protocol.carry` describes the circuit and its cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Protocol

import numpy as np

from shoal.private.protocol.bitslice import bits_of, slice_bits, spread
from shoal.private.protocol.carry import Carry, Gate
from shoal.private.protocol.layout import ReluLayout
from shoal.private.transport.wire import Wire

ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
WIDE = 256
"""Words of a plane from which one call for each sum is faster than one call for all."""


class Arrays(Protocol):
    """One party's correlated randomness by name."""

    def __getitem__(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Side:
    """One party in one inference: whether it is the client, its wire, its half of an item and the item's name."""

    client: bool
    wire: Wire
    half: Arrays
    item: str


@dataclass(frozen=True)
class Rider:
    """Extra words that travel in a message, and a function that takes the other party's extra words."""

    mine: np.ndarray
    take: Callable[[np.ndarray], None]


@dataclass(frozen=True)
class _Rows:
    """Where a carry circuit finds its planes, as index arrays.

    `clients` and `servers` are the factors of its pairs, `starts` the first pair of each sum. `generate` is each
    digit's row among the sums, and `propagate` that of each of the digits `mixed`, the only ones with such a sum.
    `full` is each digit's product of all of its bits among the monomials.
    """

    clients: np.ndarray
    servers: np.ndarray
    starts: np.ndarray
    generate: np.ndarray
    mixed: np.ndarray
    propagate: np.ndarray
    full: np.ndarray


@lru_cache(maxsize=128)
def _rows(carry: Carry) -> _Rows:
    pairs = np.array(carry.pairs, np.int64).reshape(-1, 2)
    sizes = [len(part) for d in carry.digits for part in (d.generate, d.propagate) if part]
    generate = np.cumsum([0, *(1 + bool(d.propagate) for d in carry.digits[:-1])])
    mixed = np.array([i for i, d in enumerate(carry.digits) if d.propagate], np.int64)
    return _Rows(
        clients=pairs[:, 0].copy(),
        servers=pairs[:, 1].copy(),
        starts=np.cumsum([0, *sizes[:-1]]),
        generate=generate,
        mixed=mixed,
        propagate=generate[mixed] + 1,
        full=np.cumsum([d.monomials for d in carry.digits]) - 1,
    )


@lru_cache(maxsize=128)
def _inputs(level: tuple[Gate, ...]) -> np.ndarray:
    """The rows of what a level of gates opens, among the digits' generate planes and then their propagate planes."""
    count, start, rows = sum(gate.size for gate in level), 0, list[int]()
    for gate in level:
        digits = list(range(start, start + gate.size))
        rows += [count + i for i in digits[:0:-1]] + digits[:-1] + [count + start] * gate.needs_propagate
        start += gate.size
    return np.array(rows)


@lru_cache(maxsize=128)
def _correlations(gate: Gate) -> np.ndarray:
    """The rows of a gate's blocks, as `Gate` states them, among the constant, the masks and the products."""
    singles, product = gate.size - 1, 1 + gate.inputs
    rows, several = [0], iter(range(product, product + gate.base - gate.size))
    rows += [next(several) if s & (s - 1) else s.bit_length() for s in range(1, gate.base)]
    product += gate.base - gate.size
    for i, size in enumerate(gate.blocks):
        rows += [1 + singles + i, *range(product, product + size - 1)]
        product += size - 1
    return np.array(rows)


def sign(side: Side, layout: ReluLayout, x: np.ndarray, rider: Rider | None = None) -> np.ndarray:
    """Boolean shares, one plane [W], of "x < 0" for arithmetic shares `x` uint64 [n].

    The words of `rider` travel in the first message.

    1. Both keep only the low bits + 1 bits, which are exact shares u (client) and v (server) modulo 2^(bits + 1).
    2. Both mask the monomials of their digits and exchange them: `carry.monomials` times 8 W bytes each way. Shares of
       a pair's product follow from A B = A (B ^ b) ^ (A ^ a) b ^ a b, where a b is prepared.
    3. Each level of gates opens its masked inputs: 8 W bytes for each input each way.
    4. The sign is the xor of both top bits and the carry.
    """
    carry, planes = layout.carry, slice_bits(x, layout.carry.bits + 1)
    state = _digits(side, layout, planes, rider)
    products, masks = side.half[f"{layout.name}.products"], side.half[f"{layout.name}.inputs"]
    for level in carry.levels:
        count, made = sum(g.inputs for g in level), sum(g.products for g in level)
        state = _level(side, level, state, masks[:count], products[:made])
        masks, products = masks[count:], products[made:]
    return state[0] ^ planes[carry.bits]


def monomials(carry: Carry, planes: np.ndarray) -> np.ndarray:
    """The products [carry.monomials, W] of each digit's bits over each non-empty set, in the order of the bit masks."""
    own, start = np.empty((carry.monomials, planes.shape[1]), np.uint64), 0
    for width, same in groupby(carry.digits, lambda digit: digit.width):
        digits = list(same)
        # All digits of one width at once: the sets with highest bit t are that bit alone, and with each lower set.
        bits = planes[digits[0].low : digits[-1].low + width].reshape(len(digits), width, -1)
        made = own[start : start + len(digits) * digits[0].monomials].reshape(len(digits), -1, planes.shape[1])
        for t in range(width):
            lower = (1 << t) - 1
            made[:, lower] = bits[:, t]
            np.bitwise_and(made[:, :lower], bits[:, t, None], out=made[:, lower + 1 : 2 * lower + 1])
        start += len(digits) * digits[0].monomials
    return own


def _digits(side: Side, layout: ReluLayout, planes: np.ndarray, rider: Rider | None) -> np.ndarray:
    """Shares of the digits' generate planes and then of their propagate planes; one exchange."""
    own, masks, at = monomials(layout.carry, planes), side.half[f"{layout.name}.digits"], _rows(layout.carry)
    mine = np.empty(own.size + (0 if rider is None else rider.mine.size), np.uint64)
    np.bitwise_xor(own, masks, out=mine[: own.size].reshape(own.shape))
    if rider is not None:
        mine[own.size :] = rider.mine
    theirs = side.wire.exchange(mine)
    if rider is not None:
        rider.take(theirs[own.size :])
    theirs = theirs[: own.size].reshape(own.shape)
    # The client uses its monomials, the server the masks of its own. Together they have A B without a b.
    left, right = (own, theirs) if side.client else (theirs, masks)
    terms = left.take(at.clients, 0)
    terms &= right.take(at.servers, 0)
    terms ^= side.half[f"{layout.name}.pairs"]
    sums = _sums(terms, at.starts)
    # Each party knows the product of all of its bits, one more term of propagate. Nobody reads that of digit 0.
    known = own.take(at.full, 0)
    known[at.mixed] ^= sums.take(at.propagate, 0)
    return np.concatenate([sums.take(at.generate, 0), known])


def _sums(terms: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The xor of the rows of `terms` from each start to the next."""
    if terms.shape[1] < WIDE:
        return np.bitwise_xor.reduceat(terms, starts, axis=0)
    # `reduceat` takes eight times as long as this where a row has a thousand words.
    out = np.empty((starts.size, terms.shape[1]), np.uint64)
    for i, part in enumerate(np.split(terms, starts[1:])):
        np.bitwise_xor.reduce(part, axis=0, out=out[i])
    return out


def _level(
    side: Side, gates: tuple[Gate, ...], state: np.ndarray, masks: np.ndarray, products: np.ndarray
) -> np.ndarray:
    """One level of gates, from and to `state`, which is as that of `_digits`: one exchange of all masked inputs."""
    opened = state.take(_inputs(gates), 0)
    opened ^= masks
    opened ^= side.wire.exchange(opened).reshape(opened.shape)
    constant, digit = np.full((1, state.shape[1]), ONES if side.client else 0, np.uint64), -1
    out = np.empty((2 * len(gates), state.shape[1]), np.uint64)
    for i, gate in enumerate(gates):
        mine, made = masks[: gate.inputs], products[: gate.products]
        rows, digit = np.concatenate([constant, mine, made]).take(_correlations(gate), 0), digit + gate.size
        np.bitwise_xor(state[digit], _generate(gate, opened, rows), out=out[i])
        if gate.needs_propagate:
            out[len(gates) + i] = _propagate(gate, opened, rows)
        opened, masks, products = opened[gate.inputs :], masks[gate.inputs :], products[gate.products :]
    return out


def _generate(gate: Gate, opened: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Shares of the xor of all G[i] times the P's above it, without the last G."""
    start, total = gate.base, None
    for i in range(gate.size - 1):
        size = gate.blocks[i]
        term = opened[gate.size - 1 + i] & rows[:size]
        term ^= rows[start : start + size]
        if total is not None:
            term ^= total
        total, start = _times(opened[gate.size - 2 - i], term), start + size
    assert total is not None
    return total[0]


def _propagate(gate: Gate, opened: np.ndarray, rows: np.ndarray) -> np.ndarray:
    total = opened[gate.inputs - 1] & rows[: gate.base]
    total ^= rows[-gate.base :]
    for i in range(gate.size - 1):
        total = _times(opened[gate.size - 2 - i], total)
    return total[0]


def _times(opened: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """From shares of z a[T] for every set T, shares of z x a[T] for the sets T without x, where x = opened ^ a[x]."""
    half = len(shares) // 2
    out = opened & shares[:half]
    out ^= shares[half:]
    return out


def select(side: Side, layout: ReluLayout, choice: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Arithmetic shares of choice * x, for boolean shares `choice` [W] and arithmetic shares `x` uint64 [n].

    Prepared are a random bit r, a random word t, and shares of r as a word and of r t. One exchange of 8 (W + n) bytes
    each way opens e = choice ^ r and d = x - t; then choice * x = e t + e d + (1 - 2 e) (r t + d r).
    """
    name, words = layout.name, layout.words
    value, mine = side.half[f"{name}.value"], np.empty(words + layout.count, np.uint64)
    np.bitwise_xor(choice, side.half[f"{name}.choice"], out=mine[:words])
    np.subtract(x, value, out=mine[words:])
    theirs = side.wire.exchange(mine)
    # All ones where e is 1, so (z ^ flip) - flip is (1 - 2 e) z.
    flip = spread(-bits_of(mine[:words] ^ theirs[:words], layout.count))
    d = mine[words:] + theirs[words:]
    out = d * side.half[f"{name}.choice_word"]
    out += side.half[f"{name}.chosen_value"]
    out ^= flip
    out -= flip
    if side.client:
        d += value
        d &= flip
    else:
        np.bitwise_and(value, flip, out=d)
    out += d
    return out


__all__ = ["ONES", "Arrays", "Rider", "Side", "monomials", "select", "sign"]
