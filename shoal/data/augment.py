"""Random augmentation of whole batches, on the device that holds them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.data.augmentation.autoaugment import autoaugment
from shoal.data.augmentation.pixels import FILL
from shoal.data.augmentation.resized_crop import resized_crop
from shoal.data.mapped import Images
from shoal.errors import ShoalError

POLICIES = (
    "none",
    "crop",
    "crop-flip",
    "crop-flip-cutout",
    "crop-flip-autoaugment",
    "crop-flip-autoaugment-cutout",
    "resized-crop-flip",
)
"""Augmentation policies for images."""

CLOUD_POLICIES = ("none", "scale-shift")
"""Augmentation policies for point clouds."""


def augment_batch(images_uint8: Tensor, policy: str, generator: torch.Generator) -> Tensor:
    """Augment a batch of uint8 images [N, C, H, W] or float32 clouds [N, 3, P, 1]; shape, dtype and device stay.

    Each item has its own random draws. The parts of a policy's name mean:

    - `crop`: pad with zeros by H/8 pixels, then crop at a random place.
    - `resized-crop`: crop 8 to 100 % of the area at a random place, and resize the crop to the image's size.
    - `flip`: mirror left to right with probability 1/2.
    - `cutout`: set a square with sides of H/4 around a random pixel to zero.
    - `autoaugment`: the CIFAR policy of `shoal.data.augmentation.autoaugment`. With it, the padding is grey and the
      sides of the cutout are H/2, as in the public code of *Self-Distillation* (TPAMI'21).
    - `scale-shift`: multiply each axis of a cloud by 2/3 to 3/2, then shift it by up to 0.2, as in DGCNN's public code.

    Random numbers are drawn on the generator's device, so that a seed gives the same result wherever the batch is.
    Raises ShoalError when the policy is unknown, or is for images and gets clouds, or the other way round.
    """
    check_policy(policy)
    check_suits(policy, images_uint8)
    if policy == "none":
        return images_uint8
    if policy == "scale-shift":
        return _scale_shift(images_uint8, generator)
    learned = "autoaugment" in policy
    if policy.startswith("resized-crop"):
        images = resized_crop(images_uint8, generator)
    else:
        images = _crop(images_uint8, generator, FILL if learned else 0)
    if "flip" in policy:
        images = _flip(images, generator)
    if learned:
        images = autoaugment(images, generator)
    return _cutout(images, generator, images.shape[2] // (2 if learned else 4)) if "cutout" in policy else images


def check_policy(policy: str) -> None:
    """Raise ShoalError when `policy` is neither in POLICIES nor in CLOUD_POLICIES."""
    if policy not in POLICIES + CLOUD_POLICIES:
        known = ", ".join(dict.fromkeys(POLICIES + CLOUD_POLICIES))
        raise ShoalError(f"found {policy!r} at augment; need one of {known}; correct the name")


def check_suits(policy: str, images: Images) -> None:
    """Raise ShoalError when `policy` does not suit `images`: floats are clouds, other types are images."""
    cloud = images.is_floating_point()
    if policy not in (known := CLOUD_POLICIES if cloud else POLICIES):
        raise ShoalError(
            f"found {policy!r} at augment for {'point clouds' if cloud else 'images'}; need one of {', '.join(known)}; "
            "choose one"
        )


def _draw(images: Tensor, bound: int, generator: torch.Generator) -> Tensor:
    """One random integer in 0..bound-1 per image, int64 [N]."""
    drawn = torch.randint(bound, (len(images),), generator=generator, device=generator.device)
    return drawn.to(images.device)


def _crop(images: Tensor, generator: torch.Generator, fill: int) -> Tensor:
    height, width = images.shape[2:]
    pad = height // 8
    rows, columns = (_draw(images, 2 * pad + 1, generator) for _ in range(2))
    # Indexing copies one crop per image out of a view of all crops. This is six times as fast as a gather.
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


def _scale_shift(clouds: Tensor, generator: torch.Generator) -> Tensor:
    scale, shift = torch.rand(2, *clouds.shape[:2], 1, 1, generator=generator, device=generator.device)
    scale, shift = (2 / 3 + scale * (3 / 2 - 2 / 3)).to(clouds.device), (0.4 * shift - 0.2).to(clouds.device)
    return clouds * scale + shift
