"""Batches: at any one they go on, and several processes share them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoal.training.batches import Batches
from shoal.training.settings import Settings
from tests.support.fits import DATA


@pytest.mark.parametrize("first", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("ahead", [1, 3, 4])
def test_batches_go_on_at_any_one(ahead: int, first: int) -> None:
    def drawn() -> Batches:
        batches = Batches(replace(DATA, augment="crop-flip-cutout"), Settings(seed=5), 32, (0, 1))
        batches.ahead = ahead  # as on a GPU, where many are augmented at once
        batches.begin(2)
        return batches

    whole = list(drawn().draw())
    assert [len(y) for _, y in whole] == [32] * 8
    begun = drawn()
    for _ in zip(range(first), begun.draw(), strict=False):
        pass
    rest = drawn()
    rest.generator.manual_seed(99)
    rest.load(begun.state() if first else {"batches": begun.generator.get_state(), "cpu": torch.get_rng_state()})
    for (x, y), (again_x, again_y) in zip(whole[first:], rest.draw(first), strict=True):
        assert torch.equal(x, again_x)
        assert torch.equal(y, again_y)


def test_batches_of_processes_are_parts_of_one() -> None:
    def labels(rank: int, count: int) -> list[list[int]]:
        batches = Batches(DATA, Settings(), 32, (rank, count))
        batches.begin(0)
        return [y.tolist() for _, y in batches.draw()]

    for whole, one, other in zip(labels(0, 1), labels(0, 2), labels(1, 2), strict=True):
        assert (whole[::2], whole[1::2]) == (one, other)


def test_another_kind_of_device_draws_the_rest_of_the_epoch_anew() -> None:
    batches = Batches(DATA, Settings(), 32, (0, 1))
    batches.begin(0)
    state = {"batches": torch.zeros(16, dtype=torch.uint8), "cuda": torch.zeros(16, dtype=torch.uint8)}
    before = batches.generator.get_state()
    batches.load(state | {"cpu": torch.get_rng_state()})
    assert not torch.equal(before, batches.generator.get_state())
    assert len(list(batches.draw(3))) == 5
