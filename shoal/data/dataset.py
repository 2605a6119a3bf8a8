"""Labelled data sets in memory, and augmented batches from them.

Pixels stay uint8 until `Dataset.normalise`, so a set takes a quarter of its float32 size on the device. Point clouds
use the same classes: P points are a float32 "image" [3, P, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from shoal.data.augment import augment_batch, check_policy
from shoal.errors import ShoalError

NAMES = ("digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "tiny-imagenet", "folder")
"""Names of the image sets."""
CLOUDS = ("modelnet10", "modelnet40")
"""Names of the point-cloud sets."""
SAMPLED = 500
"""Number of images per split that a fingerprint covers."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, C, H, W] or clouds float32 [N, 3, P, 1], and labels int64 [N], on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str | torch.device) -> Split:
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor | Sequence[int]) -> Split:
        """The items at `indices` (int64 [M]), in that order."""
        where = torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device)
        return Split(self.images[where], self.labels[where])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with labels 0..classes-1; `mean` and `std` are per channel, in units of pixel / 255.

    `augment` names the policy of `augment_batch` to train with.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image; (3, P, 1) for clouds."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    def normalise(self, images_uint8: Tensor) -> Tensor:
        """(pixel / 255 - mean) / std as float32, for uint8 [N, C, H, W] on any device; clouds stay unchanged."""
        if images_uint8.is_floating_point():
            return images_uint8
        mean, std = (_levels(v, images_uint8.device) for v in (self.mean, self.std))
        return (images_uint8.to(torch.float32) - mean) / std

    def to(self, device: str | torch.device) -> Dataset:
        """The same set with all three splits on `device`."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def fingerprint(self) -> str:
        """SHA-256 in hex of the set's contents, independent of where its files are.

        It covers kind, shapes, all labels, and `SAMPLED` evenly spaced images per split. For clouds it covers only mean
        and standard deviation, to hundredths: points sampled from meshes differ between machines in their last bits.
        """
        kind = self.name if self.name in (*NAMES, *CLOUDS) else "folder"
        hasher = hashlib.sha256(f"{kind}:{self.classes};".encode())
        for split in (self.train, self.val, self.test):
            chosen = torch.linspace(0, len(split) - 1, min(SAMPLED, len(split))).long()
            images = split.images[chosen.to(split.images.device)].cpu()
            exact = images
            if images.is_floating_point():
                exact = (torch.stack(torch.std_mean(images.double())) * 100).round().int()
            hasher.update(f"{tuple(split.images.shape)};".encode())
            hasher.update(split.labels.cpu().numpy().astype("<i8").tobytes())
            hasher.update(exact.contiguous().numpy().tobytes())
        return hasher.hexdigest()


@lru_cache(maxsize=64)
def _levels(parts: tuple[float, ...], device: torch.device) -> Tensor:
    """`parts` * 255 as float32 [C, 1, 1]; cached per device, because the host would wait for each copy to a GPU."""
    return torch.tensor(parts, dtype=torch.float32, device=device)[:, None, None] * 255


# ---- batches


def batches(
    split: Split, batch_size: int, *, generator: torch.Generator, augment: str, shuffle: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over `split`: (augmented images [B, C, H, W], labels int64 [B]); the last batch may be smaller.

    Images stay uint8, clouds float32. Raises ShoalError immediately for a batch size below 1 or an unknown policy.
    """
    if batch_size < 1:
        raise ShoalError(f"found {batch_size} at batch_size; need 1 or more; give 128, say")
    check_policy(augment)
    order = torch.arange(len(split))
    if shuffle:
        order = torch.randperm(len(split), generator=generator, device=generator.device)
    order = order.to(split.labels.device)
    parts = (split.take(order[start : start + batch_size]) for start in range(0, len(split), batch_size))
    return ((augment_batch(part.images, augment, generator), part.labels) for part in parts)
