"""AutoAugment's CIFAR policy (Cubuk et al., CVPR'19, Table 7 of arXiv:1805.09501), on whole batches.

Each image draws one of 25 sub-policies of two operations. Each operation has a probability and a magnitude from 0 to 9.
Colour, contrast, brightness, sharpness, shears, translations and rotations also draw a sign. The factors of the first
four are 1 - 0.9 to 1 + 0.9, as in the PyTorch ports that papers train with, so that magnitude 0 keeps the image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.data.augmentation import pixels
from shoal.data.augmentation.pixels import FILL

__all__ = ["FILL", "OPERATIONS", "POLICY", "autoaugment", "columns"]

STEPS = 9
"""The largest magnitude."""


class Operation(NamedTuple):
    """An operation on images, and the function that gives its strength.

    `strength` maps a magnitude (0 to 9) and a sign (-1 or 1) to a strength, all float64 [N]. `apply` takes images and
    strengths.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    strength: Callable[[Tensor, Tensor], Tensor]


def _to(most: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Strengths from 0 to `most`, times the sign."""
    return lambda magnitude, sign: sign * magnitude * most / STEPS


def _factor(magnitude: Tensor, sign: Tensor) -> Tensor:
    return 1 + sign * magnitude * 0.9 / STEPS


def _none(magnitude: Tensor, sign: Tensor) -> Tensor:
    return magnitude


OPERATIONS: dict[str, Operation] = {
    "shear-x": Operation(pixels.shear_x, _to(0.3)),
    "shear-y": Operation(pixels.shear_y, _to(0.3)),
    "translate-x": Operation(pixels.translate_x, _to(150 / 331)),
    "translate-y": Operation(pixels.translate_y, _to(150 / 331)),
    "rotate": Operation(pixels.rotate, _to(30)),
    "color": Operation(pixels.color, _factor),
    "contrast": Operation(pixels.contrast, _factor),
    "brightness": Operation(pixels.brightness, _factor),
    "sharpness": Operation(pixels.sharpness, _factor),
    "posterize": Operation(pixels.posterize, lambda magnitude, sign: 8 - (magnitude * 4 / STEPS).round()),
    "solarize": Operation(pixels.solarize, lambda magnitude, sign: 256 - magnitude * 256 / STEPS),
    "autocontrast": Operation(pixels.autocontrast, _none),
    "equalize": Operation(pixels.equalize, _none),
    "invert": Operation(pixels.invert, _none),
}

POLICY = """
invert 0.1 7, contrast 0.2 6
rotate 0.7 2, translate-x 0.3 9
sharpness 0.8 1, sharpness 0.9 3
shear-y 0.5 8, translate-y 0.7 9
autocontrast 0.5 8, equalize 0.9 2
shear-y 0.2 7, posterize 0.3 7
color 0.4 3, brightness 0.6 7
sharpness 0.3 9, brightness 0.7 9
equalize 0.6 5, equalize 0.5 1
contrast 0.6 7, sharpness 0.6 5
color 0.7 7, translate-x 0.5 8
equalize 0.3 7, autocontrast 0.4 8
translate-y 0.4 3, sharpness 0.2 6
brightness 0.9 6, color 0.2 8
solarize 0.5 2, invert 0 3
equalize 0.2 0, autocontrast 0.6 0
equalize 0.2 8, equalize 0.6 4
color 0.9 9, equalize 0.6 6
autocontrast 0.8 4, solarize 0.2 8
brightness 0.1 3, color 0.7 0
solarize 0.4 5, autocontrast 0.9 3
translate-y 0.9 9, translate-y 0.7 9
autocontrast 0.9 2, solarize 0.8 3
equalize 0.8 8, invert 0.1 3
translate-y 0.7 9, autocontrast 0.9 1
"""
"""One sub-policy per line: two operations with probability and magnitude, as in the paper's table."""


class _Step(NamedTuple):
    """One column of the policy: positions in OPERATIONS, probabilities and magnitudes, [25] each."""

    operation: Tensor
    probability: Tensor
    magnitude: Tensor


def _steps() -> tuple[_Step, ...]:
    rows = [[part.split() for part in line.split(",")] for line in POLICY.strip().splitlines()]
    names = list(OPERATIONS)
    return tuple(
        _Step(
            torch.tensor([names.index(name) for name, _, _ in column]),
            torch.tensor([float(probability) for _, probability, _ in column], dtype=torch.float64),
            torch.tensor([float(magnitude) for _, _, magnitude in column], dtype=torch.float64),
        )
        for column in zip(*rows, strict=True)
    )


RULES = len(POLICY.strip().splitlines())
"""Number of sub-policies."""


@lru_cache(maxsize=8)
def columns(device: torch.device) -> tuple[_Step, ...]:
    """The two columns of the policy on `device`; cached, because the host would wait for each copy to a GPU."""
    return tuple(_Step(*(values.to(device) for values in step)) for step in _steps())


def autoaugment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply a random sub-policy to each image of uint8 [N, C, H, W]; shape, dtype and device stay.

    Random numbers are drawn on the generator's device.
    """
    count, device = len(images), generator.device
    chosen = torch.randint(RULES, (count,), generator=generator, device=device)
    for step in columns(device):
        chance = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        sign = torch.randint(2, (count,), generator=generator, device=device) * 2.0 - 1.0
        operation, probability, magnitude = (values[chosen] for values in step)
        done = torch.where(chance < probability, operation, -1).to(images.device)
        images = _apply(images, done, magnitude.to(images.device), sign.double().to(images.device))
    return images


def _apply(images: Tensor, done: Tensor, magnitude: Tensor, sign: Tensor) -> Tensor:
    """Apply operation `done` (-1 for none) to each image, at its magnitude and sign; all three are [N]."""
    apply = _chosen if images.device.type == "cpu" else _all
    return apply(images, done, magnitude, sign)


def _chosen(images: Tensor, done: Tensor, magnitude: Tensor, sign: Tensor) -> Tensor:
    """Run each operation on the images that drew it only: the least work, and best on a CPU."""
    result = images.clone()
    for index, operation in enumerate(OPERATIONS.values()):
        mine = (done == index).nonzero().flatten()
        if len(mine):
            result[mine] = operation.apply(images[mine], operation.strength(magnitude[mine], sign[mine]))
    return result


def _all(images: Tensor, done: Tensor, magnitude: Tensor, sign: Tensor) -> Tensor:
    """Run each operation on all images, so that the host need not wait to learn which images drew it."""
    result = images
    for index, operation in enumerate(OPERATIONS.values()):
        changed = operation.apply(images, operation.strength(magnitude, sign))
        result = torch.where((done == index)[:, None, None, None], changed, result)
    return result
