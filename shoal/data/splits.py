"""Dividing a set: stratified splits, channel moments."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.data.dataset import Split
from shoal.data.readers import Arrays
from shoal.errors import ShoalError

Moments = tuple[tuple[float, ...], tuple[float, ...]]


# ---- dividing a set


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A shuffle of the items (int64 [N]) of which every prefix has all classes in proportion, within one item.

    Item r of a class of n is due at (r + 1/2) / n of the way; equal dues keep their shuffled order.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    labels = labels[shuffled]
    counts = labels.bincount()
    grouped = labels.argsort(stable=True)
    first = (counts.cumsum(0) - counts)[labels[grouped]]
    rank = torch.empty(len(labels), dtype=torch.float64)
    rank[grouped] = (torch.arange(len(labels)) - first).double()
    return shuffled[((rank + 0.5) / counts[labels]).argsort(stable=True)]


def divide(images: Tensor, labels: Tensor, fraction: float, seed: int) -> tuple[Arrays, Arrays]:
    """(the rest, `fraction` of the items), stratified, each in the original order."""
    order = stratified_order(labels, seed)
    count = round(fraction * len(labels))
    if not 0 < count < len(labels):
        raise ShoalError(f"found {len(labels)} images at data set; need enough for a test split; add images")
    part, rest = (chosen.sort().values for chosen in (order[:count], order[count:]))
    return (images[rest], labels[rest]), (images[part], labels[part])


def hold_out(split: Split, val: float, limit: int | None, seed: int) -> tuple[Split, Split]:
    """(train, val): both are stretches of one stratified order, hence disjoint and stratified themselves."""
    order = stratified_order(split.labels, seed)
    count = min(round(val * len(split)), len(split) - 1)
    kept, held = order[count:][:limit], order[:count]
    return split.take(kept.sort().values), split.take(held.sort().values)


def moments(images: Tensor) -> Moments:
    """Mean and standard deviation of each channel of uint8 [N, C, H, W], in units of pixel / 255; 0 and 1 of floats."""
    if images.is_floating_point():
        return (0.0,) * images.shape[1], (1.0,) * images.shape[1]
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = channel.reshape(-1).bincount(minlength=256).double() / channel.numel()
        mean = float(share @ levels)
        means.append(mean)
        # One grey level at least: a constant channel must not make `normalise` divide by zero.
        stds.append(max(float(share @ (levels - mean) ** 2) ** 0.5, 1 / 255))
    return tuple(means), tuple(stds)
