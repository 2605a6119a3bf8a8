"""Means and standard deviations that a user gives."""

from __future__ import annotations

import pytest
import torch

from shoal.data.normalisation import NORMALISATIONS, moments_of, normalised
from shoal.errors import ShoalError
from tests.conftest import blobs


def test_images_are_normalised_by_the_given_numbers() -> None:
    data = normalised(blobs(), (0.5,), (0.25,))
    pixels = data.test.images[:2]
    assert torch.allclose(data.normalise(pixels), (pixels / 255 - 0.5) / 0.25, atol=1e-6)
    plain = normalised(blobs(), *NORMALISATIONS["none"])
    assert torch.allclose(plain.normalise(pixels), pixels / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.1, 0.2, 0.3), (1, 1, 1)), ((0.5,), (0.0,)), ((0.5,), (-1.0,)), ((float("nan"),), (1.0,)), ((), ())],
)
def test_unfit_numbers_are_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ShoalError, match="for images of 1 channels; need one number for each channel"):
        normalised(blobs(), mean, std)


def test_a_name_or_both_numbers_or_neither() -> None:
    assert moments_of(None, (), ()) is None
    assert moments_of("imagenet", (), ()) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert moments_of(None, (0.5,), (0.2,)) == ((0.5,), (0.2,))
    with pytest.raises(ShoalError, match="found normalisation 'inception'; need one of imagenet, cifar, none"):
        moments_of("inception", (), ())
    for name, mean, std in ((None, (0.5,), ()), (None, (), (0.5,)), ("none", (0.5,), (0.5,))):
        with pytest.raises(ShoalError, match="need a name, or both"):
            moments_of(name, mean, std)
