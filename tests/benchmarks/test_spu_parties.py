"""The yardstick of the private benchmarks: a whole network inside SPU, between two processes."""

from __future__ import annotations

import re
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.private.answers import answers, rows_of_one_answer
from benchmarks.private.spu_parties import SpuParties
from shoal.errors import ShoalError
from shoal.private.program.clear import run_clear
from shoal.private.program.steps import Step
from tests.support.first_steps import IMAGE, AllFirstSteps
from tests.support.forked import forked, heard
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


def compiled_shapes(pipe: Connection) -> None:
    """Say the shapes of the matrix products in SPU's executable of a convolution."""
    from benchmarks.private.products import multiply
    from shoal.private.engine.spu import compile_code

    attrs = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    step = Step("conv", "conv2d", ("x",), (64, 32, 32), attrs)
    shapes: dict[str, tuple[int, ...]] = {"x": (1, 32, 32, 3), "weight": (3, 3, 3, 64)}
    code = compile_code(lambda x, weight: (multiply(step, x, weight),), shapes, ("y",)).code
    text = code if isinstance(code, str) else code.decode(errors="replace")
    dots = [line for line in text.splitlines() if "pphlo.dot" in line or "convolution" in line]
    pipe.send([re.findall(r"tensor<(\d+)x(\d+)x", line)[:2] for line in dots])


@pytest.mark.slow
@pytest.mark.private
def test_spus_compiler_leaves_the_pieces_apart(spu: None) -> None:
    with forked(compiled_shapes) as (_, pipe):
        assert heard(pipe) == [[("128", "27"), ("27", "64")]] * 8
