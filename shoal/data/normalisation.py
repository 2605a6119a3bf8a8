"""Means and standard deviations by which a network's images are normalised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from shoal.data.clouds import is_cloud
from shoal.data.dataset import Dataset
from shoal.data.splits import Moments
from shoal.errors import ShoalError

NORMALISATIONS: dict[str, Moments] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "none": ((0.0,), (1.0,)),
}
"""Mean and standard deviation of each channel by name, in units of pixel / 255; ``none`` leaves pixels in [0, 1]."""


def normalised(data: Dataset, mean: Sequence[float], std: Sequence[float]) -> Dataset:
    """`data` with another mean and standard deviation, in units of pixel / 255, one for each channel or one for all.

    Raises ShoalError for another number of values, values that are not finite, and a standard deviation of 0 or less.
    """
    channels = data.shape[0]
    wide = [tuple(map(float, v)) * (channels if len(v) == 1 else 1) for v in (mean, std)]
    if is_cloud(data.shape):
        raise ShoalError("found a mean and a standard deviation for point clouds; need none; leave them out")
    if any(len(v) != channels or not all(map(math.isfinite, v)) for v in wide) or min(wide[1], default=0) <= 0:
        raise ShoalError(
            f"found mean {list(mean)} and standard deviation {list(std)} for images of {channels} channels; need one "
            "number for each channel, in units of pixel / 255, and standard deviations above 0; give those that the "
            "network was trained with"
        )
    return replace(data, mean=wide[0], std=wide[1])


def moments_of(name: str | None, mean: Sequence[float], std: Sequence[float]) -> Moments | None:
    """Mean and standard deviation as a user gives them: by name, or both as numbers, or neither (None).

    Raises ShoalError for an unknown name, a name beside numbers, and one of both numbers without the other.
    """
    if name is not None and name not in NORMALISATIONS:
        raise ShoalError(f"found normalisation {name!r}; need one of {', '.join(NORMALISATIONS)}; or give numbers")
    if (name is not None and (mean or std)) or bool(mean) != bool(std):
        raise ShoalError(
            f"found normalisation {name}, mean {list(mean)} and standard deviation {list(std)}; need a name, or both "
            "mean and standard deviation; leave out the others"
        )
    if name is not None:
        return NORMALISATIONS[name]
    return (tuple(mean), tuple(std)) if mean else None
