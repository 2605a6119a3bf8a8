"""Stratified splits of a data set, and channel moments."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from shoal.data.dataset import Split
from shoal.data.decoded import Moments, remembered
from shoal.data.mapped import Images, Kind, MappedImages, chosen
from shoal.errors import ShoalError
from shoal.progress import counter

PIECE_BYTES = 1 << 23
"""Most bytes of images that are counted at a time."""
MANY = 200_000
"""Number of images from which on counting their pixels shows progress."""


# ---- splits


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A random order of the items, int64 [N], in which every prefix has the classes in proportion, within one item.

    Item r of a class with n items gets the key (r + 1/2) / n, by which items are sorted; ties keep their shuffled
    order.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    labels = labels[shuffled]
    counts = labels.bincount()
    grouped = labels.argsort(stable=True)
    first = (counts.cumsum(0) - counts)[labels[grouped]]
    rank = torch.empty(len(labels), dtype=torch.float64)
    rank[grouped] = (torch.arange(len(labels)) - first).double()
    return shuffled[((rank + 0.5) / counts[labels]).argsort(stable=True)]


def divide(images: Kind, labels: Tensor, fraction: float, seed: int) -> tuple[tuple[Kind, Tensor], tuple[Kind, Tensor]]:
    """Split items into (the rest, `fraction` of them), stratified; both keep the original order.

    Raises ShoalError when either part would be empty.
    """
    order = stratified_order(labels, seed)
    count = round(fraction * len(labels))
    if not 0 < count < len(labels):
        raise ShoalError(f"found {len(labels)} images at data set; need enough for a test split; add images")
    part, rest = (some.sort().values for some in (order[:count], order[count:]))
    return (chosen(images, rest), labels[rest]), (chosen(images, part), labels[part])


def hold_out(split: Split, val: float, limit: int | None, seed: int) -> tuple[Split, Split]:
    """(train, val): val has the fraction `val` of the items, train at most `limit` of the others.

    Both are ranges of one stratified order, so they are disjoint and stratified.
    """
    order = stratified_order(split.labels, seed)
    count = min(round(val * len(split)), len(split) - 1)
    kept, held = order[count:][:limit], order[:count]
    return split.take(kept.sort().values), split.take(held.sort().values)


def moments(images: Images) -> Moments:
    """Mean and standard deviation per channel of uint8 [N, C, H, W], in units of pixel / 255; 0 and 1 for floats.

    They are computed once for images in a file, and kept beside it.
    """
    if isinstance(images, MappedImages):
        return remembered(images, lambda: _moments(_counts(images)))
    if images.is_floating_point():
        return (0.0,) * images.shape[1], (1.0,) * images.shape[1]
    return _moments(_counts(images))


def _counts(images: Images) -> Tensor:
    """How many pixels of each channel have each value, int64 [C, 256]."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    piece_length = max(1, PIECE_BYTES // images.shape[1:].numel())
    with counter("images for mean and deviation", len(images)) if len(images) > MANY else nullcontext() as advance:
        for start in range(0, len(images), piece_length):
            piece = images[start : start + piece_length].cpu()
            counts += torch.stack([channel.reshape(-1).bincount(minlength=256) for channel in piece.unbind(1)])
            if advance is not None:
                advance(start + len(piece), len(images))
    return counts


def _moments(counts: Tensor) -> Moments:
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in counts:
        share = channel.double() / int(channel.sum())
        mean = float(share @ levels)
        means.append(mean)
        # At least one grey level: a constant channel must not make `normalise` divide by zero.
        stds.append(max(float(share @ (levels - mean) ** 2) ** 0.5, 1 / 255))
    return tuple(means), tuple(stds)
