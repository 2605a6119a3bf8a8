"""Packed products of polynomials against convolutions, modulo 2^64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shoal.errors import ShoalError
from shoal.private.products.packing import Convolution, Packing, pack
from shoal.private.program.steps import Step

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    """Convolutions of all kinds: strides, dilations, uneven kernels and paddings, groups, depthwise, 1x1, linear."""
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    channels, outputs = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    sides = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    kernel = draw(st.one_of(st.just((1, 1)), PAIRS))
    found = Convolution(channels, *sides, outputs, kernel, draw(PAIRS), padding, draw(PAIRS), groups)
    assume(all(n >= 1 for n in found.result))
    return found


def multiply(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x w modulo X^N + 1 and 2^64, term by term."""
    out = np.zeros_like(x)
    for power in np.flatnonzero(w):
        turned = np.roll(x, power)
        turned[:power] = np.uint64(0) - turned[:power]
        out += turned * np.uint64(int(w[power]) % 2**64)
    return out


def packed(packing: Packing, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The convolution by products of polynomials."""
    inputs = packing.input_polynomials(x)
    answers = np.zeros((len(packing.tiles), packing.answers, packing.degree), np.uint64)
    for answer, index in packing.pairs:
        polynomial = packing.weight_polynomial(packing.rows(w, answer), answer, index)
        assert index in packing.needed([answer])
        for tile in range(len(packing.tiles)):
            answers[tile, answer] += multiply(inputs[tile, index], polynomial)
    return packing.place(answers[:, :, packing.positions])


def convolve(conv: Convolution, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The convolution by its definition, modulo 2^64."""
    (rows, columns), (s, r), (d, e) = conv.result, conv.stride, conv.dilation
    x = np.pad(x, ((0, 0), *((p, p) for p in conv.padding)))
    out = np.zeros((conv.outputs, rows, columns), np.uint64)
    per_in, per_out = conv.channels // conv.groups, conv.outputs // conv.groups
    for o, c, a, b in np.ndindex(w.shape):
        rows_of = slice(a * d, a * d + (rows - 1) * s + 1, s)
        out[o] += w[o, c, a, b] * x[o // per_out * per_in + c, rows_of, b * e : b * e + (columns - 1) * r + 1 : r]
    return out


@given(convolutions(), st.sampled_from((64, 128, 512)), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_products_of_packed_polynomials_are_the_convolution(conv: Convolution, degree: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.integers(0, 2**64, (conv.channels, conv.height, conv.width), np.uint64)
    w = random.integers(-(2**15), 2**15, (conv.outputs, conv.channels // conv.groups, *conv.kernel))
    w[random.random(len(w)) < 0.2] = 0
    try:
        packing = pack(conv, degree)
    except ShoalError:
        assume(False)
    want = convolve(conv, x, w.astype(np.uint64))
    assert np.array_equal(packed(packing, x, w), want)
    assert packing.products == len(packing.pairs) * len(packing.tiles)


RESNET18 = [(3, 64, 1, 32, 3), *[(64, 64, 1, 32, 3)] * 4] + [
    row
    for c, o, side in ((64, 128, 32), (128, 256, 16), (256, 512, 8))
    for row in ((c, o, 2, side, 3), (c, o, 2, side, 1), *[(o, o, 1, side // 2, 3)] * 3)
]


def test_a_resnet18_takes_a_quarter_of_spus_products() -> None:
    """SPU's matrix products take 69,376 ciphertext products for the same layers."""
    layers = [Convolution(c, side, side, o, (k, k), (s, s), (k // 2, k // 2)) for c, o, s, side, k in RESNET18]
    packings = [pack(conv, 8192) for conv in (*layers, Convolution(512, 1, 1, 100))]
    assert sum(p.products for p in packings) == 15_450
    assert sum(p.inputs * p.count for p in packings) == 616
    assert sum(p.answers * p.count for p in packings) == 482


def test_depthwise_products_of_different_groups_are_left_out() -> None:
    packing = pack(Convolution(64, 8, 8, 64, (3, 3), (1, 1), (1, 1), (1, 1), 64), 8192)
    assert packing.products < packing.answers * packing.inputs


def test_large_planes_are_cut_into_tiles() -> None:
    packing = pack(Convolution(3, 224, 224, 64, (7, 7), (2, 2), (3, 3)), 8192)
    assert packing.count > 1
    assert packing.ci * packing.co * packing.size <= 8192


def test_a_kernel_above_the_degree_is_refused() -> None:
    with pytest.raises(ShoalError, match="a kernel that reads 100 values at once; need at most 64"):
        pack(Convolution(1, 10, 10, 1, (10, 10)), 64)


def test_a_convolution_without_its_kernels_size_is_refused() -> None:
    attrs = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    with pytest.raises(ShoalError, match="without its kernel's size at c;"):
        Convolution.of(Step("c", "conv2d", ("x",), (1, 2, 2), attrs), (1, 2, 2))
