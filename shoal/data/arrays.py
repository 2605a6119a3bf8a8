"""Data sets from arrays in memory and from PyTorch's DataLoaders."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.data.dataset import Dataset, Split
from shoal.data.splits import divide, hold_out, moments
from shoal.errors import ShoalError, ShoalWarning, first_line

CHANNELS = (1, 3)
"""Numbers of channels of images."""


def from_arrays(
    images: Any, labels: Any, *, test: tuple[Any, Any] | float = 0.2, val: float = 0.1, seed: int = 0, **facts: Any
) -> Dataset:
    """A data set of images and labels in memory.

    `images` is a tensor or array of uint8 pixels, or of floats that are pixel / 255 (as torchvision's ToTensor makes
    them): [N, C, H, W], [N, H, W, C] or [N, H, W], with C = 1 or 3. `labels` are integers [N] from 0. `test` is
    another pair of images and labels, or the fraction of these to test with; `val` is the fraction of the rest that is
    held out for validation. Both are drawn stratified by class, from `seed`. `facts` are fields of `Dataset` in place
    of those found here: name, classes, mean, std, augment, class_names. Raises ShoalError for other images and labels.
    """
    pixels, numbers = as_pixels(images), as_labels(labels)
    if len(pixels) != len(numbers) or not len(pixels):
        raise ShoalError(f"found {len(pixels)} images and {len(numbers)} labels; need as many of both, at least one")
    if isinstance(test, tuple):
        rest, held = (pixels, numbers), (as_pixels(test[0]), as_labels(test[1]))
    else:
        rest, held = divide(pixels, numbers, test, seed)
    kept, validation = hold_out(Split(*rest), val, None, seed)
    mean, std = moments(kept.images)
    _check_first(numbers, facts)
    names: Sequence[str] = facts.get("class_names", ())
    found = {"name": "arrays", "classes": len(names) or int(numbers.max()) + 1, "mean": mean, "std": std}
    return Dataset(train=kept, val=validation, test=Split(*held), **{**found, "augment": "none", **facts})


def _check_first(labels: Tensor, facts: Mapping[str, Any]) -> None:
    """Raise ShoalError for labels that do not begin at 0, where no number of classes says that this is meant.

    Warns of a single class.
    """
    first, last = int(labels.min()), int(labels.max())
    if first > 0 and not facts.get("classes") and not facts.get("class_names"):
        raise ShoalError(
            f"found labels {first} to {last}; need labels from 0; subtract {first}, or give the number of classes "
            f"(classes={last + 1}) if no image of class 0 is there"
        )
    if first == last:
        warnings.warn(f"found one class ({first}); need two or more to tell classes apart", ShoalWarning, stacklevel=3)


def from_loader(loader: Iterable[Any], *, test: Iterable[Any] | float = 0.2, **more: Any) -> Dataset:
    """All batches (images, labels) of a DataLoader as one data set; `test` may be a second DataLoader.

    The loader's transforms must end with ToTensor or PILToTensor: images that are normalised or augmented already are
    refused, because the data set does both. `more` are further arguments of `from_arrays`. Raises ShoalError as
    `from_arrays` does.
    """
    images, labels = _batches(loader)
    held = test if isinstance(test, float) else _batches(test)
    return from_arrays(images, labels, test=held, **more)


def _batches(loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    pairs = [(as_pixels(images), as_labels(labels)) for images, labels in _read(loader)]
    if not pairs:
        raise ShoalError("found a loader without a batch; need at least one; check the data set that it reads")
    return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])


def _read(loader: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    try:
        for batch in loader:
            images, labels = batch
            yield images, labels
    except (TypeError, ValueError) as error:
        raise ShoalError(
            f"found a {type(loader).__name__} that gives no pairs of images and labels ({first_line(error)}); need a "
            "DataLoader whose batches are (images, labels); pass one"
        ) from error


def as_pixels(images: Any) -> Tensor:
    """Images as uint8 [N, C, H, W], from the forms that `from_arrays` takes. Raises ShoalError for others."""
    found = given = _tensor(images, "images", "need pixels as a tensor or array; read files with Dataset.from_folder")
    found = found[:, None] if found.ndim == 3 else found
    if found.ndim == 4 and found.shape[1] not in CHANNELS and found.shape[3] in CHANNELS:
        found = found.permute(0, 3, 1, 2)
    if found.ndim != 4 or found.shape[1] not in CHANNELS:
        raise ShoalError(
            f"found images of shape {list(given.shape)}; need [N, C, H, W], [N, H, W, C] or "
            "[N, H, W], with 1 or 3 channels; reorder the axes"
        )
    return (_from_unit(found) if found.is_floating_point() else _from_integers(found)).contiguous()


def _from_integers(images: Tensor) -> Tensor:
    if len(images) and not 0 <= int(images.min()) <= int(images.max()) <= 255:
        raise ShoalError(
            f"found pixels from {int(images.min())} to {int(images.max())}; need 0 to 255; scale images of 16 bits by "
            "1 / 257"
        )
    return images.to(torch.uint8)


def _from_unit(images: Tensor) -> Tensor:
    """Pixels of images whose values are pixel / 255."""
    scaled = images.float() * 255
    if len(images) and not ((scaled - scaled.round()).abs().max() < 0.01 and 0 <= scaled.min() <= scaled.max() <= 255):
        low, high = float(images.min()), float(images.max())
        raise ShoalError(
            f"found float images with values from {low:.3g} to {high:.3g}; need pixels 0 to 255, or pixel / 255 as "
            "ToTensor gives it; leave out Normalize and augmentation, which the data set does"
        )
    return scaled.round().to(torch.uint8)


def as_labels(labels: Any) -> Tensor:
    """Labels as int64 [N]; [N, 1] is flattened. Raises ShoalError for fractions, negative numbers and other shapes."""
    found = _tensor(labels, "labels", "need integers from 0; number the classes, and pass their names as class_names")
    found = found[:, 0] if found.ndim == 2 and found.shape[1] == 1 else found
    if found.ndim != 1 or (found.is_floating_point() and not torch.equal(found, found.round())):
        raise ShoalError(
            f"found labels {found.dtype} of shape {list(found.shape)}; need one integer for each image; from one-hot "
            "rows take argmax(1)"
        )
    if len(found) and int(found.min()) < 0:
        raise ShoalError(
            f"found labels {int(found.min())} to {int(found.max())}; need integers from 0; leave out the images "
            "without a class, or add to all labels"
        )
    return found.long()


def _tensor(given: Any, what: str, need: str) -> Tensor:
    """`given` as a tensor. Raises ShoalError with `need` if it holds no numbers."""
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(given).__name__
        raise ShoalError(f"found {what} of type {kind} that hold no numbers ({first_line(error)}); {need}") from error
