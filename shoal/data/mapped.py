"""Images in a file that is read batch by batch, for sets that do not fit in memory.

`MappedImages` stands where a `Split` otherwise has a tensor. It has the tensor's shape and type, and an index gives the
pixels as a tensor, so batches are the same as those from memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

READERS = 8
"""Threads that read one batch. A disk serves several reads at a time faster than one after the other."""
PART = 16
"""Images that one thread reads at a time."""


class MappedImages:
    """Images uint8 [N, C, H, W] in a .npy file; only those that an index asks for are read into memory.

    `rows` are the images of the file that belong to this object, int64 [N] on the CPU; None means all, in their order.
    An index gives a tensor on `device`. Raises OSError, ValueError or EOFError when the file is missing or
    damaged.
    """

    dtype = torch.uint8
    ndim = 4

    def __init__(self, path: Path, rows: Tensor | None = None, device: str | torch.device = "cpu") -> None:
        self.path, self.device = path, torch.device(device)
        stored = np.load(path, mmap_mode="r")
        if stored.ndim != self.ndim or stored.dtype != np.uint8:
            raise ValueError(f"an array {stored.dtype} {list(stored.shape)}, not uint8 [N, C, H, W]")
        self._stored = np.asarray(stored)
        self.rows = torch.arange(len(stored)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        """[N, C, H, W]."""
        return torch.Size((len(self), *self._stored.shape[1:]))

    def is_floating_point(self) -> bool:
        """False: pixels are uint8."""
        return False

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> Tensor:
        """The images at `index` (a slice, or integers [M]), uint8 [M, C, H, W] on `device`; a copy."""
        rows = self.rows[index.cpu() if isinstance(index, Tensor) else index].numpy()
        found = np.empty((len(rows), *self._stored.shape[1:]), np.uint8)

        def read(first: int) -> None:
            found[first : first + PART] = self._stored[rows[first : first + PART]]

        if len(rows) <= PART:
            read(0)
        else:
            with ThreadPoolExecutor(READERS) as pool:
                list(pool.map(read, range(0, len(rows), PART)))
        return torch.from_numpy(found).to(self.device)

    def chosen(self, index: Tensor) -> MappedImages:
        """The images at `index`, int64 [M], as another such object; nothing is read."""
        return MappedImages(self.path, self.rows[index.cpu()], self.device)

    def to(self, device: str | torch.device) -> MappedImages:
        """The same images, whose batches go to `device`; the images stay in the file."""
        return MappedImages(self.path, self.rows, device)


Images = Tensor | MappedImages
"""Images uint8 [N, C, H, W] (or clouds float32 [N, 3, P, 1]), in memory or in a file."""
Kind = TypeVar("Kind", bound=Images)
"""Either of both."""
Labelled = tuple[Images, Tensor]
"""Images, and their labels int64 [N]."""


def chosen(images: Kind, index: Tensor) -> Kind:
    """The images at `index`, int64 [M]. Those in a file stay there; those in memory are copied."""
    return cast(Kind, images.chosen(index) if isinstance(images, MappedImages) else images[index])
