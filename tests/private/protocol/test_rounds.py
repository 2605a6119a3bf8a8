"""Rounds of ANDs: every stored product is made once, from what is there before its round, in the fewest rounds."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.private.protocol.carry import Carry
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.offline import prepare
from shoal.private.protocol.randomness import new_seed
from shoal.private.protocol.rounds import product_sets, rounds
from tests.support.dealing import Dealer, Engine, both, one_relu


@pytest.mark.parametrize("bits", range(1, 64))
def test_each_product_is_that_of_its_masks(bits: int) -> None:
    gates = [gate for level in Carry(bits).levels for gate in level]
    inputs = sum(gate.inputs for gate in gates)
    masks = np.random.default_rng(bits).integers(0, 2**64, inputs, np.uint64)
    table = dict(enumerate(masks))
    for each in rounds(Carry(bits)):
        made = {k: table[i] & table[j] for i, j, k in zip(each.left, each.right, each.made, strict=True)}
        assert not set(made) & set(table)
        table |= made
    want, start = list(masks), 0
    for gate in gates:
        own = masks[start : start + gate.inputs]
        want += [np.bitwise_and.reduce([m for i, m in enumerate(own) if s >> i & 1]) for s in product_sets(gate)]
        start += gate.inputs
    assert [table[i] for i in range(len(table))] == want
    assert len(want) == inputs + sum(gate.products for gate in gates)


@pytest.mark.parametrize("bits", [1, 4, 5, 16, 18, 20, 21, 63])
def test_there_are_as_many_rounds_as_doubling_needs(bits: int) -> None:
    gates = [gate for level in Carry(bits).levels for gate in level]
    most = max((s.bit_count() for gate in gates for s in product_sets(gate)), default=1)
    assert len(rounds(Carry(bits))) == (most - 1).bit_length()


def test_all_items_and_relus_share_the_calls_of_an_engine() -> None:
    calls: list[str] = []

    class Counting(Engine):
        def ands(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            calls.append("and")
            return super().ands(a, b)

    program = one_relu(100, 18)
    layout, dealer = Layout(program), Dealer(program, None)  # type: ignore[arg-type]  # no linear step, no weight
    both(lambda client: prepare(layout, Counting(dealer, client), client, [new_seed() for _ in range(3)]))
    assert layout.and_rounds == 3
    assert len(calls) == 2 * layout.and_rounds
