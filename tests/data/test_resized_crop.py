"""Random resized crops: the boxes' distribution, and pixels equal to those of PyTorch's own resizing of each crop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shoal.data.augment import augment_batch
from shoal.data.augmentation import resized_crop as module
from shoal.data.augmentation.resized_crop import random_boxes, resized, resized_crop
from tests.support.layouts import seeded

PICTURES = torch.randint(0, 256, (40, 3, 24, 18), dtype=torch.uint8, generator=seeded())


@pytest.mark.parametrize("side", [(24, 18), (18, 24), (32, 32)])
def test_crops_are_resized_as_by_pytorch(side: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (30, 3, *side), dtype=torch.uint8, generator=seeded())
    boxes = random_boxes(len(images), images.shape[2:], seeded(3))
    assert len(boxes.unique(dim=0)) > 20
    for image, found, (top, left, down, across) in zip(images, resized(images, boxes), boxes.tolist(), strict=True):
        crop = image[None, :, top : top + down, left : left + across].float()
        exact = F.interpolate(crop, side, mode="bilinear", align_corners=False)[0]
        assert (found - exact).abs().max() <= 0.5 + 1e-3


def test_boxes_have_the_stated_areas_and_ratios_and_lie_inside() -> None:
    top, left, down, across = random_boxes(20_000, torch.Size((224, 224)), seeded()).double().unbind(1)
    area, ratio = down * across / 224**2, across / down
    assert min(top.min(), left.min()) == 0
    assert max((top + down).max(), (left + across).max()) == 224
    assert 0.075 <= area.min() < 0.1
    assert area.max() > 0.98
    assert 0.73 <= ratio.min() < 0.77
    assert 1.3 < ratio.max() <= 1.37
    assert abs(ratio.log().mean()) < 0.01
    # Uniform from 0.08 to 1 has the mean 0.54; large crops that do not fit are drawn again, so the mean is smaller.
    assert 0.46 < area.mean() < 0.54


@pytest.mark.parametrize(
    ("size", "box"), [((20, 200), (0, 86, 20, 27)), ((200, 20), (86, 0, 27, 20)), ((9, 9), (0, 0, 9, 9))]
)
def test_where_no_crop_fits_the_largest_in_the_centre_is_taken(
    size: tuple[int, int], box: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AREA", (2.0, 3.0))
    assert random_boxes(3, torch.Size(size), seeded()).tolist() == [list(box)] * 3


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resized_crop(PICTURES, seeded(1))
    monkeypatch.setattr(module, "PIECE", 7)
    assert torch.equal(resized_crop(PICTURES, seeded(1)), whole)


def test_the_policy_crops_then_mirrors() -> None:
    generator = seeded(5)
    cropped = resized_crop(PICTURES, generator)
    mirrored = torch.randint(2, (len(PICTURES),), generator=generator).bool()
    expected = torch.where(mirrored[:, None, None, None], cropped.flip(3), cropped)
    assert torch.equal(augment_batch(PICTURES, "resized-crop-flip", seeded(5)), expected)
