"""Fixed point in the ring Z_2^64 against Python's integers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import ShoalError
from shoal.private.program import convolution
from shoal.private.program.convolution import Team
from shoal.private.program.fixed import FixedPoint, RingConv2d, RingLinear, limbs, peak

# --- exact arithmetic ------------------------------------------------------------------------------------------


def words(rng: np.random.Generator, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), size=shape, dtype=np.int64)


def wrapped(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def big_conv(x: np.ndarray, w: np.ndarray, s: int, p: int, d: int, groups: int) -> np.ndarray:
    """The definition, in Python integers of any size."""
    # Padded first: np.pad fills an object array with NumPy's own zeros, which overflow.
    x = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p))).astype(object)
    (n, _, h, wide), (out, part, k, _) = x.shape, w.shape
    rows, columns = (h - d * (k - 1) - 1) // s + 1, (wide - d * (k - 1) - 1) // s + 1
    y = np.zeros((n, out, rows, columns), dtype=np.int64)
    for index in np.ndindex(*y.shape):
        i, o, r, q = index
        first = o // (out // groups) * part
        window = x[i, first : first + part, r * s : r * s + d * (k - 1) + 1 : d, q * s : q * s + d * (k - 1) + 1 : d]
        y[index] = wrapped(int((window * w[o].astype(object)).sum()))
    return y


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    x_bits=st.integers(2, 64),
    w_bits=st.integers(2, 64),
    s=st.integers(1, 2),
    p=st.integers(0, 2),
    d=st.integers(1, 2),
    groups=st.sampled_from((1, 2)),
    plane=st.sampled_from((None, 1, 1 << 20)),
    threads=st.integers(1, 3),
)
def test_conv_is_exact_mod_2_64(
    seed: int, x_bits: int, w_bits: int, s: int, p: int, d: int, groups: int, plane: int | None, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    x, w = words(rng, x_bits, (2, 4, 5, 6)), words(rng, w_bits, (4, 4 // groups, 3, 3))
    attrs = {"stride": (s, s), "padding": (p, p), "dilation": (d, d), "groups": groups}
    with mock.patch.object(convolution, "LEAST_PRODUCTS", 1):  # or these would be too small to be shared
        got = RingConv2d(torch.from_numpy(w), attrs, plane, Team(threads))(torch.from_numpy(x))
    np.testing.assert_array_equal(got.numpy(), big_conv(x, w, s, p, d, groups))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), x_bits=st.integers(2, 64), w_bits=st.integers(2, 64), width=st.integers(1, 300))
def test_linear_is_exact_mod_2_64(seed: int, x_bits: int, w_bits: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = words(rng, x_bits, (3, width)), words(rng, w_bits, (2, width))
    exact = x.astype(object) @ w.astype(object).T
    got = RingLinear(torch.from_numpy(w))(torch.from_numpy(x))
    assert got.tolist() == [[wrapped(int(v)) for v in row] for row in exact]


@pytest.mark.parametrize("value", [-(2**63), 2**63 - 1, -1, 0, 2**53 + 1])
def test_linear_at_the_ring_s_edges(value: int) -> None:
    for other in (-(2**63), 2**63 - 1, 1, -1, 2**31 + 1):
        got = RingLinear(torch.full((1, 3), other))(torch.full((1, 3), value))
        assert got.item() == wrapped(3 * value * other)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), st.integers(1, 52))
def test_limbs_recombine(values: list[int], bits: int) -> None:
    parts = limbs(torch.tensor(values), bits)
    assert all(peak(limb) <= 2**bits for _, limb in parts)
    assert [sum(int(limb[i]) << shift for shift, limb in parts) for i in range(len(values))] == values


# --- encoding --------------------------------------------------------------------------------------------------


@given(st.floats(-(2.0**30), 2.0**30), st.integers(1, 30))
def test_encode_is_nearest_and_decode_undoes_it(value: float, f: int) -> None:
    fixed = FixedPoint(f)
    word = fixed.encode(value)
    assert abs(float(fixed.decode(word)) - value) <= 0.5 / fixed.scale
    assert fixed.encode(fixed.decode(word)) == word
    assert fixed.encode(-value) == -word


@given(st.integers(-(2**62), 2**62), st.integers(1, 30))
def test_truncate_rounds_down(word: int, f: int) -> None:
    assert int(FixedPoint(f).truncate(np.array([word]))[0]) == word // 2**f
    assert FixedPoint(f).truncate(torch.tensor([word])).item() == word // 2**f


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**47, -(2.0**48)])
def test_encode_refuses_what_has_no_word(bad: float) -> None:
    with pytest.raises(ShoalError, match="in here"):
        FixedPoint(16).encode(np.array([0.0, bad]), "here")


@pytest.mark.parametrize(("f", "field"), [(0, 64), (31, 64), (16, 32), (True, 64), (8.0, 64)])
def test_fixed_point_refuses_unknown_forms(f: Any, field: int) -> None:
    with pytest.raises(ShoalError, match="need"):
        FixedPoint(f, field)
