"""Images beyond what was calibrated: the client refuses them, because their logits would be wrong without a word."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shoal.errors import ShoalError
from shoal.private.compiler.compilation import input_limit, rounded_up
from shoal.private.program.images import encoded
from tests.support.inferences import infer
from tests.support.parties import Case

SENTENCE = r"^found a value of magnitude .* at image 1; need at most .*; normalise the image .*compile"


def error_of(net: Case, image: np.ndarray) -> float:
    """The largest difference between the private logits of an image and those of the float network."""
    logits, _ = infer(net, net.program, np.rint(image.astype(np.float64) / net.unit))
    return float(np.abs(logits[-1] * net.unit - net.graph(torch.from_numpy(image[None]))[-1].numpy()).max())


def test_an_image_that_would_overflow_is_refused_and_one_at_the_limit_is_right(small: Case) -> None:
    images, limit = small.images[:2].numpy(), small.program.input_limit
    at_limit = images * np.float32(limit / np.abs(images[1]).max())
    at_limit[0] = images[0]
    beyond = at_limit.copy()
    beyond[1] *= 16
    assert encoded(small.program, at_limit).shape == images.shape
    assert error_of(small, at_limit[1]) <= 4 * small.program.error_bound
    # This is what would happen without the limit.
    assert error_of(small, beyond[1]) > 1000 * small.program.error_bound
    with pytest.raises(ShoalError, match=SENTENCE):
        encoded(small.program, beyond)
    at_limit[1] *= 1.0001
    with pytest.raises(ShoalError, match=SENTENCE):
        encoded(small.program, at_limit)


def test_the_limit_is_a_power_of_two_within_the_margin(small: Case) -> None:
    seen = float(small.images.abs().max())
    assert 2 * seen < small.program.input_limit <= 4 * seen
    assert all(math.frexp(v)[0] in (0.0, 0.5) for v in [small.program.input_limit, *small.program.ranges.values()])
    assert [rounded_up(v) for v in (0.0, 0.3, 1.0, 1.1, 4.0)] == [0.0, 0.5, 1.0, 2.0, 4.0]
    # With a margin of 1 the calibration images themselves are still accepted.
    assert [input_limit(v, m) for v, m in ((3.0, 4.0), (4.0, 4.0), (3.0, 1.0), (0.0, 4.0))] == [8.0, 16.0, 4.0, 0.0]
