"""Augmentation of whole batches on their device, each image by its own draw."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.augment.autoaugment import FILL, autoaugment
from shoal.errors import ShoalError

POLICIES = (
    "none",
    "crop",
    "crop-flip",
    "crop-flip-cutout",
    "crop-flip-autoaugment",
    "crop-flip-autoaugment-cutout",
)


def augment_batch(images_uint8: Tensor, policy: str, generator: torch.Generator) -> Tensor:
    """Augment uint8 [N, C, H, W], each image by its own draw; same shape, type and device.

    `crop` moves by up to H/8 pixels over zero padding, `flip` mirrors every other image or so, `autoaugment` is the
    CIFAR policy (`shoal.augment.autoaugment`), `cutout` zeroes a square with sides of H/4 around any pixel. With it,
    the padding is grey and the square's sides are H/2, as in the public code of *Self-Distillation* (TPAMI'21). Draws
    are made on the generator's device, so that a seed gives the same images on every device. Raises ShoalError for a
    policy not in POLICIES.
    """
    check_policy(policy)
    if policy == "none":
        return images_uint8
    learned = "autoaugment" in policy
    images = _crop(images_uint8, generator, FILL if learned else 0)
    if "flip" in policy:
        images = _flip(images, generator)
    if learned:
        images = autoaugment(images, generator)
    return _cutout(images, generator, images.shape[2] // (2 if learned else 4)) if "cutout" in policy else images


def check_policy(policy: str) -> None:
    """Raise ShoalError for a policy not in POLICIES."""
    if policy not in POLICIES:
        raise ShoalError(f"found {policy!r} at augment; need one of {', '.join(POLICIES)}; correct the name")


def _draw(images: Tensor, bound: int, generator: torch.Generator) -> Tensor:
    """One integer in 0..bound-1 for each image."""
    drawn = torch.randint(bound, (len(images),), generator=generator, device=generator.device)
    return drawn.to(images.device)


def _crop(images: Tensor, generator: torch.Generator, fill: int) -> Tensor:
    height, width = images.shape[2:]
    pad = height // 8
    rows, columns = (_draw(images, 2 * pad + 1, generator) for _ in range(2))
    # Every possible crop as a view, of which indexing copies one an image: six times as fast as a gather.
    crops = F.pad(images, (pad, pad, pad, pad), value=fill).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(len(images), device=images.device), :, rows, columns]


def _flip(images: Tensor, generator: torch.Generator) -> Tensor:
    mirrored = _draw(images, 2, generator).bool()[:, None, None, None]
    return torch.where(mirrored, images.flip(3), images)


def _cutout(images: Tensor, generator: torch.Generator, side: int) -> Tensor:
    def band(length: int) -> Tensor:
        offset = torch.arange(length, device=images.device) - _draw(images, length, generator)[:, None] + side // 2
        return (offset >= 0) & (offset < side)

    rows, columns = (band(length) for length in images.shape[2:])
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
