"""Random crops of other sizes and shapes, resized to the images' size: the usual augmentation for ImageNet.

Szegedy et al., *Going deeper with convolutions*, CVPR'15, section 6; the numbers are those of torchvision's
RandomResizedCrop.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

AREA = (0.08, 1.0)
"""Smallest and largest part of an image's area."""
RATIO = (3 / 4, 4 / 3)
"""Smallest and largest width / height."""
TRIES = 10
"""Crops that are drawn for each image. The first that fits into the image is taken."""
PIECE = 256
"""Images that are resized at a time, which bounds the memory for float32 pixels."""


def resized_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop of each image, resized bilinearly to the images' size; uint8 [N, C, H, W] -> the same shape.

    A crop has 8 to 100 % of the area and is at most 4/3 as wide as high, or the other way round. If ten such crops do
    not fit, the largest in the centre is taken.
    """
    boxes = random_boxes(len(images), images.shape[2:], generator).to(images.device)
    pairs = zip(images.split(PIECE), boxes.split(PIECE), strict=True)
    return torch.cat([resized(some, own) for some, own in pairs]) if len(images) else images


def random_boxes(count: int, size: torch.Size, generator: torch.Generator) -> Tensor:
    """Top, left, height and width of one crop for each of `count` images of `size` (H, W): int64 [count, 4]."""
    height, width = size
    drawn = torch.rand(2 * TRIES + 2, count, generator=generator, device=generator.device).double()
    area = (AREA[0] + (AREA[1] - AREA[0]) * drawn[:TRIES]) * height * width
    low, high = (math.log(ratio) for ratio in RATIO)
    ratio = (low + (high - low) * drawn[TRIES : 2 * TRIES]).exp()
    across, down = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (across >= 1) & (across <= width) & (down >= 1) & (down <= height)
    first, some = fits.int().argmax(0, keepdim=True), fits.any(0)
    usual = _centre(height, width)
    down = torch.where(some, down.gather(0, first)[0], usual[2])
    across = torch.where(some, across.gather(0, first)[0], usual[3])
    top = torch.where(some, (drawn[-2] * (height - down + 1)).floor(), usual[0])
    left = torch.where(some, (drawn[-1] * (width - across + 1)).floor(), usual[1])
    return torch.stack([top, left, down, across], 1).long()


def _centre(height: int, width: int) -> tuple[float, float, float, float]:
    """Top, left, height and width of the largest crop in the centre whose ratio is in RATIO."""
    down = min(height, max(1, round(width / RATIO[0])))
    across = min(width, max(1, round(height * RATIO[1])))
    return (height - down) // 2, (width - across) // 2, down, across


def resized(images: Tensor, boxes: Tensor) -> Tensor:
    """The crop `boxes`[i] (top, left, height, width; int64 [N, 4]) of image i, resized bilinearly to the images' size.

    uint8 [N, C, H, W] -> the same shape. Crops are never reduced in size, so no filter is needed.
    """
    mixed = images.float()
    for axis in (2, 3):
        start, length = boxes[:, axis - 2, None], boxes[:, axis, None]
        size = images.shape[axis]
        where = (torch.arange(size, device=images.device) + 0.5) * length / size - 0.5
        where = where.clamp(min=torch.zeros_like(length), max=length - 1)
        before = where.floor().long()
        after = torch.minimum(before + 1, length - 1)
        near, far = (_taken(mixed, start + index, axis) for index in (before, after))
        part = _along(where - before, axis)
        mixed = near + part * (far - near)
    return mixed.round().to(torch.uint8)


def _along(values: Tensor, axis: int) -> Tensor:
    """`values` [N, L] as [N, 1, L, 1] or [N, 1, 1, L], with L at `axis`."""
    return values[:, None, :, None] if axis == 2 else values[:, None, None, :]


def _taken(images: Tensor, index: Tensor, axis: int) -> Tensor:
    """Rows or columns of each image at its own `index` [N, L]."""
    return images.gather(axis, _along(index, axis).expand(images.shape))
