"""Labelled image sets held in memory: load them, split them, draw augmented batches from them.

Pixels stay uint8 until `Dataset.normalise`, so that a set costs a quarter of its float size on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal import readers
from shoal.errors import ShoalError
from shoal.readers import Arrays, Cifar

NAMES = ("digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "tiny-imagenet", "folder")
POLICIES = ("none", "crop", "crop-flip", "crop-flip-cutout")

# Where data are looked for without a root: beside the user's work, then where Debian's data packages put theirs.
DEFAULT_ROOTS = (Path(".data"), Path("/usr/share/datasets"))

# Mirrored digits and letters are other symbols, and only its owner knows that about a `folder`.
_AUGMENT = {"fashion-mnist": "crop", "cifar10": "crop-flip", "cifar100": "crop-flip", "tiny-imagenet": "crop-flip"}

_Moments = tuple[tuple[float, ...], tuple[float, ...]]
_PUBLISHED: dict[str, _Moments] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

_CIFAR = {
    "cifar10": Cifar(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        label_key=b"labels",
        classes=10,
    ),
    "cifar100": Cifar(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        train=("train",),
        test="test",
        label_key=b"fine_labels",
        classes=100,
    ),
}

_SOURCES = {
    "fashion-mnist": "install Debian's package dataset-fashion-mnist, or fetch the four IDX files of "
    "github.com/zalandoresearch/fashion-mnist",
    "cifar10": "fetch cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100": "fetch cifar-100-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html",
    "svhn": "fetch train_32x32.mat and test_32x32.mat from ufldl.stanford.edu/housenumbers",
    "tiny-imagenet": "fetch and unpack tiny-imagenet-200.zip from cs231n.stanford.edu",
}


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, C, H, W] and their labels int64 [N], on one device."""

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
    """An image set with labels 0..classes-1; `mean` and `std` per channel are in units of pixel / 255.

    `augment` names the policy of `augment_batch` that suits the set's training.
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
        """(C, H, W) of every image."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    def normalise(self, images_uint8: Tensor) -> Tensor:
        """(pixel / 255 - mean) / std as float32, for uint8 [N, C, H, W] on any device."""
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=images_uint8.device)[:, None, None] * 255
            for v in (self.mean, self.std)
        )
        return (images_uint8.to(torch.float32) - mean) / std

    def to(self, device: str | torch.device) -> Dataset:
        """The same set with all three splits on `device`."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))


def load(
    name: str,
    root: str | Path | None = None,
    *,
    val: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    size: int | None = None,
) -> Dataset:
    """Load the set `name`: one of NAMES, or a directory of images by class.

    `root` holds the data, or the set's published folder or archive; without it, DEFAULT_ROOTS are searched.
    `val` is the fraction of the training images held out, stratified and chosen by `seed`. `limit` keeps that
    many of the remaining training images, stratified. `size` resizes every image to size x size pixels.
    Without `size`, digits are 16x16 and fashion-mnist is zero-padded to 32x32.

    Raises ShoalError for an unknown name, an argument out of range, and missing or damaged data.
    """
    _check_arguments(val, limit, size)
    kind, root = _kind(name, root)
    train, test, classes = _read(kind, root, size, seed)
    kept, held = _hold_out(Split(*train), val, limit, seed)
    mean, std = _PUBLISHED.get(kind) or _moments(kept.images)
    return Dataset(name, kept, held, Split(*test), classes, mean, std, _AUGMENT.get(kind, "none"))


def _check_arguments(val: float, limit: int | None, size: int | None) -> None:
    if not 0 <= val < 1:
        raise ShoalError(f"found {val} at val; need a fraction in [0, 1); give 0.1, say, or 0 for none")
    for name, value in (("limit", limit), ("size", size)):
        if value is not None and value < 1:
            raise ShoalError(f"found {value} at {name}; need 1 or more; leave it out for the whole set as it is")


def _kind(name: str, root: str | Path | None) -> tuple[str, Path | None]:
    """The entry of NAMES that reads `name`, and where its data are. Known names win over directories."""
    if name in NAMES:
        return name, None if root is None else Path(root).expanduser()
    if Path(name).expanduser().is_dir() and root is None:
        return "folder", Path(name).expanduser()
    close = get_close_matches(name, NAMES, n=1)
    hint = f"did you mean {close[0]}?" if close else "give one of these, or the path of a directory and no root"
    raise ShoalError(f"found {name!r} at data set name; need one of {', '.join(NAMES)}; {hint}")


# ---- finding and reading each set


def _read(kind: str, root: Path | None, size: int | None, seed: int) -> tuple[Arrays, Arrays, int]:
    if kind == "folder":
        return _read_folder(root, size, seed)
    if kind == "tiny-imagenet":
        return readers.read_tiny_imagenet(_find(kind, root, "tiny-imagenet-200", "wnids.txt"), size)
    if kind == "digits":
        train, test = _read_digits()
        return _resize(train, size or 16), _resize(test, size or 16), 10
    train, test = _read_fashion(root) if kind == "fashion-mnist" else _read_colour(kind, root)
    return _resize(train, size), _resize(test, size), len(_CIFAR["cifar100"].train)
