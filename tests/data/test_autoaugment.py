"""AutoAugment on batches: every operation against Pillow, image by image, and laws of the whole policy."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from shoal.data.augment import augment_batch
from shoal.data.augmentation import pixels
from shoal.data.augmentation.autoaugment import OPERATIONS, POLICY, autoaugment, columns

GREY = (128, 128, 128)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(channels: int = 3, count: int = 8, height: int = 32, width: int = 32) -> Tensor:
    """Smooth images, noise, and one of a single colour."""
    noise = torch.randint(256, (count, channels, height, width), generator=seeded(3), dtype=torch.uint8)
    ramp = (torch.arange(height)[:, None] * 3 + torch.arange(width) * 2 + 40).clamp(max=255).to(torch.uint8)
    noise[: count // 2] = ramp // torch.arange(1, channels + 1, dtype=torch.uint8)[:, None, None]
    noise[0] = 77
    return noise


def moved(matrix: Callable[[float, Image.Image], tuple[float, ...]]) -> Callable[[Image.Image, float], Image.Image]:
    def move(image: Image.Image, strength: float) -> Image.Image:
        where = matrix(strength, image)
        return image.transform(image.size, Image.Transform.AFFINE, where, Image.Resampling.NEAREST, fillcolor=GREY)

    return move


def enhanced(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, strength: kind(image).enhance(strength)


PILLOW: dict[str, tuple[Callable[[Image.Image, float], Image.Image], tuple[float, ...]]] = {
    "shear-x": (moved(lambda v, i: (1, v, 0, 0, 1, 0)), (0, 0.3, -0.3, 0.2333)),
    "shear-y": (moved(lambda v, i: (1, 0, 0, v, 1, 0)), (0, 0.3, -0.3, 0.2667)),
    "translate-x": (moved(lambda v, i: (1, 0, v * i.size[0], 0, 1, 0)), (0, 0.453, -0.453, 0.1, -0.35)),
    "translate-y": (moved(lambda v, i: (1, 0, 0, 0, 1, v * i.size[1])), (0, 0.453, -0.453, 0.1, -0.15)),
    "rotate": (lambda i, v: i.rotate(v, Image.Resampling.NEAREST, fillcolor=GREY), (0, 6.67, -6.67, 30, -30, 17)),
    "color": (enhanced(ImageEnhance.Color), (1, 0.1, 1.9, 0.7, 0)),
    "contrast": (enhanced(ImageEnhance.Contrast), (1, 0.1, 1.9, 0.7, 0)),
    "brightness": (enhanced(ImageEnhance.Brightness), (1, 0.1, 1.9, 0.7, 0)),
    "sharpness": (enhanced(ImageEnhance.Sharpness), (1, 0.1, 1.9, 0.7, 0)),
    "posterize": (lambda i, v: ImageOps.posterize(i, int(v)), (8, 7, 5, 4)),
    "solarize": (lambda i, v: ImageOps.solarize(i, math.ceil(v)), (256, 199.1, 128, 28.4, 0)),
    "autocontrast": (lambda i, v: ImageOps.autocontrast(i), (0,)),
    "equalize": (lambda i, v: ImageOps.equalize(i), (0,)),
    "invert": (lambda i, v: ImageOps.invert(i), (0,)),
}


@pytest.mark.parametrize("size", [(32, 32), (17, 24)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_gives_pillows_pixels(name: str, size: tuple[int, int]) -> None:
    reference, strengths = PILLOW[name]
    images = pictures(height=size[0], width=size[1])
    for strength in strengths:
        # Strengths differ within the batch: the odd images have another one, which is not looked at.
        own = torch.where(torch.arange(len(images)) % 2 == 0, strength, strengths[0]).double()
        result = OPERATIONS[name].apply(images, own)
        for i in range(0, len(images), 2):
            expected = reference(Image.fromarray(images[i].permute(1, 2, 0).numpy()), strength)
            assert torch.equal(result[i], torch.from_numpy(np.array(expected)).permute(2, 0, 1)), (strength, i)


VOID = ("autocontrast", "equalize", "invert")
"""Operations without a magnitude."""


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in VOID])
def test_magnitude_0_keeps_the_image_and_9_does_not(name: str, channels: int) -> None:
    images, operation = pictures(channels), OPERATIONS[name]
    zero, most = torch.zeros(len(images)).double(), torch.full((len(images),), 9.0).double()
    for sign in (torch.ones_like(zero), -torch.ones_like(zero)):
        assert torch.equal(operation.apply(images, operation.strength(zero, sign)), images)
        changed = not torch.equal(operation.apply(images, operation.strength(most, sign)), images)
        assert changed or (name, channels) == ("color", 1)  # grey has no colour


# magnitude 9 and sign -1; posterize's bits at all magnitudes are the rounded steps from 8 to 4
STRENGTHS = [("rotate", -30.0), ("shear-x", -0.3), ("translate-y", -150 / 331), ("color", 0.1), ("solarize", 0.0)]


@pytest.mark.parametrize(("name", "expected"), STRENGTHS)
def test_strengths(name: str, expected: float) -> None:
    one = torch.ones(1).double()
    assert OPERATIONS[name].strength(9 * one, -one).item() == pytest.approx(expected)


def test_posterizes_bits_fall_from_8_to_4() -> None:
    bits = OPERATIONS["posterize"].strength(torch.arange(10).double(), torch.ones(10).double())
    assert bits.tolist() == [8, 8, 7, 7, 6, 6, 5, 5, 4, 4]


def test_the_policy_has_25_pairs() -> None:
    assert len(POLICY.strip().splitlines()) == 25
    assert all(len(values) == 25 for step in columns(torch.device("cpu")) for values in step)
    assert all(0 <= p <= 1 for step in columns(torch.device("cpu")) for p in step.probability.tolist())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_keeps_its_form_and_follows_the_generator(channels: int) -> None:
    images = pictures(channels, count=64)
    kept = images.clone()
    one, two, other = (autoaugment(images, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(images, kept)
    assert (one.shape, one.dtype) == (images.shape, torch.uint8)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_images_of_a_batch_have_operations_of_their_own() -> None:
    images = pictures(count=2)[1:].expand(400, -1, -1, -1).contiguous()
    results = autoaugment(images, seeded())
    assert len({bytes(image.numpy().tobytes()) for image in results}) > 30


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    images = pictures(count=16)
    others = images.clone()
    others[1:] = 255 - others[1:]
    assert torch.equal(autoaugment(images, seeded(5))[0], autoaugment(others, seeded(5))[0])


def test_pairs_are_drawn_equally_often() -> None:
    images = torch.full((20_000, 1, 1, 1), 100, dtype=torch.uint8)
    inverted = (autoaugment(images, seeded()) == 155).double().mean()
    # Solarize inverts 100 at magnitude 8 (threshold 28.4), in a line that does so at 0.2, and not at 5 (113.8). So
    # invert's two lines and that one are all: (0.1 + 0.1 + 0.2) / 25.
    assert inverted.item() == pytest.approx(0.4 / 25, abs=0.003)


def test_cutout_after_autoaugment_is_half_as_wide_as_the_image() -> None:
    images = torch.full((300, 1, 16, 16), 200, dtype=torch.uint8)
    plain = augment_batch(images, "crop-flip-autoaugment", seeded())
    cut = augment_batch(images, "crop-flip-autoaugment-cutout", seeded())
    zeroed = ((cut == 0) & (plain != 0)).sum((1, 2, 3))
    assert zeroed.max() == 64
    assert ((cut == plain) | (cut == 0)).all()


def test_small_images_have_no_inside_to_smooth() -> None:
    images = pictures(height=2, width=2)
    assert torch.equal(pixels.sharpness(images, torch.zeros(len(images)).double()), images)


def test_all_images_by_every_operation_is_what_each_has_by_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of GPUs, which waits for nothing, against that of CPUs."""
    images, module = pictures(count=200), sys.modules["shoal.data.augmentation.autoaugment"]
    own = autoaugment(images, seeded())
    monkeypatch.setattr(module, "_chosen", module._all)  # type: ignore[attr-defined]
    assert torch.equal(own, autoaugment(images, seeded()))
