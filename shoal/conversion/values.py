"""Where PyTorch's network has the values of an ONNX file, so that transposing and reshaping them computes nothing."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from shoal.errors import ShoalError

Numbers = np.ndarray
MOST = 2**24
"""Largest number of entries of a value for one image, so that a damaged file cannot fill the memory."""


@dataclass(frozen=True, eq=False)
class Value:
    """A value for one image: the step of the network that gives it, its shape there, and where its entries are.

    `shape` is PyTorch's, without the batch: [C, H, W] or [F]. `order` has the shape that the value has in the file,
    with a batch of 1, and for each entry its position in the flattened PyTorch value. None stands for the same order.
    """

    step: str
    shape: tuple[int, ...]
    order: Numbers | None = None

    @property
    def places(self) -> Numbers:
        """`order`, written out."""
        return natural(self.shape) if self.order is None else self.order

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape in the file, with a batch of 1."""
        return (1, *self.shape) if self.order is None else self.order.shape

    def ordered(self, order: Numbers) -> Value:
        """The same value with its entries in another order or shape. Raises ValueError if that merges images."""
        if order.ndim < 2 or order.shape[0] != 1:
            raise ValueError("a shape without the images as its first dimension")
        same = order.shape == (1, *self.shape) and bool((order == natural(self.shape)).all())
        return replace(self, order=None if same else order)

    def axes(self) -> list[tuple[int, ...]]:
        """All orders of axes, as `np.transpose` takes them, that make the file's value of the PyTorch value."""
        if self.order is None:
            return [tuple(range(1 + len(self.shape)))]
        if self.order.ndim != 1 + len(self.shape):
            return []
        plain = natural(self.shape)
        found = [(0, *p) for p in itertools.permutations(range(1, plain.ndim))]
        return [p for p in found if np.array_equal(plain.transpose(p), self.order)]

    def spread(self, constant: Numbers) -> Numbers:
        """A constant of the file, which broadcasts to the value, in PyTorch's shape and order.

        Raises ValueError if it does not broadcast.
        """
        wide = np.broadcast_to(constant, self.file_shape)
        found = np.empty(math.prod(self.shape), np.float32)
        found[self.places.ravel()] = wide.ravel()
        return found.reshape(self.shape)


def natural(shape: tuple[int, ...]) -> Numbers:
    """The positions of a value in PyTorch's own order, with a batch of 1."""
    return np.arange(math.prod(shape)).reshape(1, *shape)


def check_size(shape: tuple[int, ...], where: str) -> None:
    """Raise ShoalError for a value that is too large."""
    if math.prod(shape) > MOST:
        raise ShoalError(
            f"found a value of shape {shape} at {where}; need at most {MOST:,} numbers for one image; check the file"
        )


def image(shape: tuple[int, ...], given: tuple[int | None, ...], name: str) -> Value:
    """The images of `shape` ([C, H, W]) as the file `name` takes them, whose input has the shape `given`.

    The file may have channels first or last, or all pixels of a grey image in one dimension. Raises ShoalError for
    other shapes.
    """
    plain = natural(shape)
    orders = [plain, plain.transpose(0, 2, 3, 1)]
    orders += [plain[:, 0], plain.reshape(1, -1)] if shape[0] == 1 else []
    for order in orders:
        sizes = zip(given[1:], order.shape[1:], strict=False)
        if len(given) == order.ndim and all(size in (None, found) for size, found in sizes):
            return Value("", shape).ordered(order)
    shown = " x ".join("any" if size is None else str(size) for size in given) or "unknown shape"
    raise ShoalError(
        f"found an input of {shown} in {name}; need images x {' x '.join(map(str, shape))} as the data set has, "
        "or with channels last; give the data that the network was trained for, or --size"
    )
