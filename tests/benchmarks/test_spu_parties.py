"""The yardstick of the private benchmarks: a whole network inside SPU, between two processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.private.products import answers, rows_of_one_answer
from benchmarks.private.spu_parties import SpuParties
from shoal.errors import ShoalError
from shoal.private.program.clear import run_clear
from tests.support.first_steps import IMAGE, AllFirstSteps
from tests.support.parties import Everything, case, seeded

UNITS = 6
"""Each truncation may be one unit off; the little networks here have few, damped by the layers after them."""


@pytest.mark.slow
@pytest.mark.private
@pytest.mark.parametrize("shared", [False, True])
def test_every_operation_gives_the_logits_of_the_clear_executor(tmp_path: Path, spu: None, shared: bool) -> None:
    masks = {"relu2": torch.rand(6, 8, 8) < 0.5, "relu3": torch.tensor([True, False, True, True, False, True])}
    net = case(seeded(Everything), tmp_path, masks, "YACL_Ferret" if shared else "YACL_Softspoken")
    truth = run_clear(net.program, net.weights, net.images[:2])
    with SpuParties(tmp_path, batch=2, shared=shared, threads=1) as parties:
        result = parties.query(net.images[:2].numpy())
        for found, wanted in zip(result.exits, truth, strict=True):
            assert np.abs(found - wanted).max() <= UNITS * net.unit
        assert np.abs(result.logits - net.truth(2)).max() <= max(net.program.error_bound, UNITS * net.unit)
        assert 0 < result.relu_s + result.linear_s < result.seconds
        assert result.bytes > 10_000
        parties.processes[0].kill()
        with pytest.raises(ShoalError, match="SPU process dead"):
            parties.query(net.images[:2].numpy())


@pytest.mark.slow
@pytest.mark.private
def test_every_operation_may_read_the_image(tmp_path: Path, spu: None) -> None:
    # SPU truncates a value that one party owns at that party, so no pad is needed.
    net = case(AllFirstSteps(), tmp_path, {}, shape=IMAGE)
    images = net.images[:4].numpy()
    with SpuParties(tmp_path, batch=4, threads=1) as parties:
        exits = parties.query(images).exits
    for found, clear in zip(exits, run_clear(net.program, net.weights, images), strict=True):
        assert np.abs(found - clear).max() <= UNITS * net.unit


@pytest.mark.parametrize(
    ("sizes", "whole", "rows"),
    [((1024, 27, 64), 8, 128), ((256, 1152, 128), 4, 64), ((16, 4608, 512), 1, 16), ((64, 64, 512), 4, 16)],
)
def test_products_are_cut_until_each_has_one_answer(sizes: tuple[int, int, int], whole: int, rows: int) -> None:
    # The numbers of answers were seen on the wire of SPU 0.9.5.
    assert answers(*sizes) == whole
    assert rows_of_one_answer(*sizes) == rows
    assert answers(rows, *sizes[1:]) == 1
