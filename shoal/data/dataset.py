"""Labelled data sets in memory or in a file, and augmented batches from them.

Pixels stay uint8 until `Dataset.normalise`, so a set takes a quarter of its float32 size on the device. Point clouds
use the same classes: P points are a float32 "image" [3, P, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.data.augment import augment_batch, check_policy
from shoal.data.mapped import Images, chosen
from shoal.errors import ShoalError

NAMES = ("digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "tiny-imagenet", "folder")
"""Names of the image sets."""
CLOUDS = ("modelnet10", "modelnet40")
"""Names of the point-cloud sets."""
SAMPLED = 500
"""Number of images per split that a fingerprint covers."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, C, H, W] or clouds float32 [N, 3, P, 1], and labels int64 [N], on one device.

    Images that do not fit in memory are `MappedImages`: an index reads them from a file, to that device.
    """

    images: Images
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str | torch.device) -> Split:
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor | Sequence[int]) -> Split:
        """The items at `indices` (int64 [M]), in that order."""
        where = torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device)
        return Split(chosen(self.images, where), self.labels[where])


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A data set with labels 0..classes-1; `mean` and `std` are per channel, in units of pixel / 255.

    `augment` names the policy of `augment_batch` to train with. `class_names` has a name for each label, or nothing.
    `fit` is the rule by which image files of another size were brought to `shape` (see `shoal.data.images.FITS`), or
    None if that was not asked for.
    Raises ShoalError for other images than uint8 [N, C, H, W] (or clouds float32 [N, 3, P, 1]), other labels than int64
    [N] in 0..classes-1, splits that do not fit together, and an unfit mean or standard deviation.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    class_names: tuple[str, ...] = ()
    fit: str | None = None

    def __post_init__(self) -> None:
        check_dataset(self)

    def __repr__(self) -> str:
        shape, sizes = "x".join(map(str, self.shape)), (len(self.train), len(self.val), len(self.test))
        parts = "{:,} train, {:,} validation, {:,} test".format(*sizes)
        return f"Dataset({self.name!r}: {shape}, {self.classes} classes; {parts})"

    @classmethod
    def from_arrays(cls, images: Any, labels: Any, **more: Any) -> Dataset:
        """A set of images and labels in memory, split at random; see `shoal.data.arrays.from_arrays`."""
        from shoal.data.arrays import from_arrays

        return from_arrays(images, labels, **more)

    @classmethod
    def from_loader(cls, loader: Iterable[Any], **more: Any) -> Dataset:
        """All batches of a PyTorch DataLoader as one set; see `shoal.data.arrays.from_loader`."""
        from shoal.data.arrays import from_loader

        return from_loader(loader, **more)

    @classmethod
    def from_folder(cls, folder: str | Path, **more: Any) -> Dataset:
        """A folder of images by class; `more` are arguments of `shoal.load`. Raises ShoalError as `load` does."""
        from shoal.data.loading import load

        path = Path(folder).expanduser().absolute()
        if not path.is_dir():
            raise ShoalError(f"found no folder at {folder}; need a folder of images by class; correct the path")
        return load(str(path), **more)

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
            sample = torch.linspace(0, len(split) - 1, min(SAMPLED, len(split))).long()
            images = split.images[sample.to(split.images.device)].cpu()
            exact = images
            if images.is_floating_point():
                exact = (torch.stack(torch.std_mean(images.double())) * 100).round().int()
            hasher.update(f"{tuple(split.images.shape)};".encode())
            hasher.update(split.labels.cpu().numpy().astype("<i8").tobytes())
            hasher.update(exact.contiguous().numpy().tobytes())
        return hasher.hexdigest()


def check_kind(data: Any) -> None:
    """Raise ShoalError for something else than a `Dataset`, which is how most first programs go wrong."""
    if not isinstance(data, Dataset):
        advice = {"str": "shoal.load(NAME)", "DataLoader": "shoal.Dataset.from_loader(LOADER)"}
        make = advice.get(type(data).__name__, "shoal.load(NAME) or shoal.Dataset.from_arrays(IMAGES, LABELS)")
        raise ShoalError(f"found a {type(data).__name__} as data; need a shoal.Dataset; make one with {make}")


def check_dataset(data: Dataset) -> None:
    """Raise ShoalError, with one sentence, for the first thing that is wrong with a `Dataset`."""
    if not len(data.train):
        raise ShoalError(f"found no training image in data set {data.name!r}; need at least one; add images")
    shape = tuple(data.train.images.shape[1:])
    for part in ("train", "val", "test"):
        split: Split = getattr(data, part)
        _check_images(split.images, shape, f"{part} of data set {data.name!r}")
        _check_labels(split, data.classes, f"{part} of data set {data.name!r}")
    widths = {len(data.mean), len(data.std)}
    if widths != {shape[0]} or not min(data.std, default=0) > 0:
        raise ShoalError(
            f"found mean {data.mean} and standard deviation {data.std} for {shape[0]} channels; need one number above "
            "0 for each channel, in units of pixel / 255; compute them from the training images"
        )
    if data.class_names and len(data.class_names) != data.classes:
        raise ShoalError(
            f"found {len(data.class_names)} class names for {data.classes} classes; need one for each; or leave "
            "them out"
        )


def _check_images(images: Images, shape: tuple[int, ...], where: str) -> None:
    clouds = images.dtype == torch.float32 and images.ndim == 4 and images.shape[1] == 3 and images.shape[3] == 1
    if images.ndim != 4 or not (images.dtype == torch.uint8 or clouds):
        raise ShoalError(
            f"found images {images.dtype} {list(images.shape)} in {where}; need uint8 [N, C, H, W] with pixels 0 to "
            "255, which the data set normalises itself; give the pixels (Dataset.from_arrays converts usual arrays)"
        )
    if tuple(images.shape[1:]) != shape and len(images):
        raise ShoalError(
            f"found images of shape {list(images.shape[1:])} in {where}; need {list(shape)} as in train; resize them"
        )


def _check_labels(split: Split, classes: int, where: str) -> None:
    labels, count = split.labels, len(split.images)
    if labels.dtype != torch.int64 or labels.shape != (count,):
        raise ShoalError(
            f"found labels {labels.dtype} {list(labels.shape)} for {count} images in {where}; need int64 [{count}], "
            "one for each image; convert them (labels.flatten().long())"
        )
    if count and not labels.is_meta and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ShoalError(
            f"found labels {int(labels.min())} to {int(labels.max())} in {where}; need 0 to {classes - 1}; subtract "
            "the smallest label, or give the right number of classes"
        )


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
    return ((augment_batch(part.images[:], augment, generator), part.labels) for part in parts)
