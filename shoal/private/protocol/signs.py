"""Signs and ReLUs of shared values from prepared correlations. Both parties call the same functions.

A value is the xor of its boolean shares or the sum mod 2^64 of its arithmetic shares. Counts are for n values, in
planes of W = ceil(n / 64) words. `shoal.private.protocol.carry` describes the circuit and its cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from shoal.private.protocol.bitslice import slice_bits, unpack
from shoal.private.protocol.carry import Carry, Digit, Gate
from shoal.private.protocol.layout import ReluLayout
from shoal.private.transport.wire import Wire

ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


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
class _Indices:
    """A carry circuit's pairs as index arrays, and the start of each sum among them."""

    clients: np.ndarray
    servers: np.ndarray
    starts: np.ndarray


@lru_cache(maxsize=128)
def _indices(carry: Carry) -> _Indices:
    pairs = np.array(carry.pairs, np.int64).reshape(-1, 2)
    sizes = [len(part) for d in carry.digits for part in (d.generate, d.propagate) if part]
    return _Indices(pairs[:, 0].copy(), pairs[:, 1].copy(), np.cumsum([0, *sizes[:-1]]))


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
    generate, propagate = _digits(side, layout, planes, rider)
    products, masks = side.half[f"{layout.name}.products"], side.half[f"{layout.name}.inputs"]
    for level in carry.levels:
        count, made = sum(g.inputs for g in level), sum(g.products for g in level)
        generate, propagate = _level(side, level, generate, propagate, masks[:count], products[:made])
        masks, products = masks[count:], products[made:]
    return generate[0] ^ planes[carry.bits]


def monomials(digit: Digit, planes: np.ndarray) -> Iterator[np.ndarray]:
    """The product of the digit's bits over each non-empty set, in the order of the sets' bit masks."""
    made: list[np.ndarray] = []
    for mask in range(1, digit.monomials + 1):
        top = mask.bit_length() - 1
        rest = mask ^ (1 << top)
        made.append(planes[digit.low + top] & made[rest - 1] if rest else planes[digit.low + top])
    yield from made


def _digits(
    side: Side, layout: ReluLayout, planes: np.ndarray, rider: Rider | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Shares of each digit's generate and propagate bits, least significant first; one exchange."""
    carry = layout.carry
    own = np.stack([m for digit in carry.digits for m in monomials(digit, planes)])
    masks = side.half[f"{layout.name}.digits"]
    mine = (own ^ masks).ravel()
    theirs = side.wire.exchange(mine if rider is None else np.concatenate([mine, rider.mine]))
    if rider is not None:
        rider.take(theirs[mine.size :])
    theirs = theirs[: mine.size].reshape(own.shape)
    at = _indices(carry)
    # The client uses its monomials, the server the masks of its own. Together they have A B without a b.
    left, right = (own, theirs) if side.client else (theirs, masks)
    terms = left[at.clients] & right[at.servers]
    terms ^= side.half[f"{layout.name}.pairs"]
    return _sums(carry, np.bitwise_xor.reduceat(terms, at.starts, axis=0), own)


def _sums(carry: Carry, sums: np.ndarray, own: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    generate, propagate, row, start = [], [], 0, 0
    for digit in carry.digits:
        generate.append(sums[row])
        row, start = row + 1, start + digit.monomials
        # Each party knows the product of all of its bits, which is one more term.
        known = own[start - 1]
        if digit.propagate:
            known, row = known ^ sums[row], row + 1
        propagate.append(known)
    return generate, propagate


def _level(
    side: Side,
    gates: tuple[Gate, ...],
    generate: list[np.ndarray],
    propagate: list[np.ndarray],
    masks: np.ndarray,
    products: np.ndarray,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """One level of gates: one exchange of the masked inputs of all gates."""
    parts = list(_split(gates, generate, propagate))
    shares = np.stack([x for gate, g, p in parts for x in gate_inputs(gate, g, p)])
    shares ^= masks
    opened = shares ^ side.wire.exchange(shares).reshape(shares.shape)
    out_g, out_p = [], []
    for gate, g, _ in parts:
        blocks = _blocks(side.client, gate, masks[: gate.inputs], products[: gate.products])
        out_g.append(g[-1] ^ _generate(gate, opened, blocks))
        out_p.append(_propagate(gate, opened, blocks) if gate.needs_propagate else g[-1])
        opened, masks, products = opened[gate.inputs :], masks[gate.inputs :], products[gate.products :]
    return out_g, out_p


def _split(
    gates: tuple[Gate, ...], generate: list[np.ndarray], propagate: list[np.ndarray]
) -> Iterator[tuple[Gate, list[np.ndarray], list[np.ndarray]]]:
    start = 0
    for gate in gates:
        yield gate, generate[start : start + gate.size], propagate[start : start + gate.size]
        start += gate.size


def gate_inputs(gate: Gate, generate: list[np.ndarray], propagate: list[np.ndarray]) -> list[np.ndarray]:
    """The inputs that a gate opens, in the order that `Gate` states."""
    return propagate[:0:-1] + generate[:-1] + propagate[:1] * gate.needs_propagate


def _blocks(client: bool, gate: Gate, masks: np.ndarray, products: np.ndarray) -> list[np.ndarray]:
    """Shares of the products of masks, in blocks as `Gate` states, from own masks and prepared products."""
    base = np.empty((gate.base, masks.shape[1]), np.uint64)
    base[0] = ONES if client else 0
    singles = [1 << i for i in range(gate.size - 1)]
    base[singles] = masks[: gate.size - 1]
    several = [s for s in range(1, gate.base) if s not in singles]
    base[several] = products[: len(several)]
    blocks, products = [base], products[len(several) :]
    for mask, size in zip(masks[gate.size - 1 :], gate.blocks, strict=True):
        blocks.append(np.concatenate([mask[None], products[: size - 1]]))
        products = products[size - 1 :]
    return blocks


def _generate(gate: Gate, opened: np.ndarray, blocks: list[np.ndarray]) -> np.ndarray:
    """Shares of the xor of all G[i] times the P's above it, without the last G."""
    base, total = blocks[0], None
    for i in range(gate.size - 1):
        term = opened[gate.size - 1 + i] & base[: gate.blocks[i]]
        term ^= blocks[1 + i]
        total = _times(opened[gate.size - 2 - i], term if total is None else term ^ total)
    assert total is not None
    return total[0]


def _propagate(gate: Gate, opened: np.ndarray, blocks: list[np.ndarray]) -> np.ndarray:
    total = opened[gate.inputs - 1] & blocks[0]
    total ^= blocks[-1]
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
    value = side.half[f"{name}.value"]
    mine = np.concatenate([choice ^ side.half[f"{name}.choice"], x - value])
    theirs = side.wire.exchange(mine)
    e = unpack(mine[:words] ^ theirs[:words], layout.count)
    d = mine[words:] + theirs[words:]
    flip = np.uint64(0) - e  # all ones where e is 1, so (z ^ flip) - flip is (1 - 2 e) z
    out = d * side.half[f"{name}.choice_word"]
    out += side.half[f"{name}.chosen_value"]
    out ^= flip
    out -= flip
    out += flip & (value + d if side.client else value)
    return out


__all__ = ["ONES", "Arrays", "Rider", "Side", "gate_inputs", "monomials", "select", "sign"]
