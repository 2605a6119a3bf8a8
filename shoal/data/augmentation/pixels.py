"""Image operations on batches of uint8 [N, C, H, W], with a strength for each image; results equal Pillow's.

Strengths are float64 [N]. Results have the shape, dtype and device of the images. Geometric operations take the nearest
pixel, by Pillow's rule with 16 fractional bits, and use grey for pixels outside the image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FILL = 128
"""The grey value of pixels that come from outside the image."""

ONE = 1 << 16


def invert(images: Tensor, strength: Tensor) -> Tensor:
    """255 minus each value; `strength` is ignored."""
    return 255 - images


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values at or above the threshold; 256 keeps all."""
    return torch.where(images < threshold[:, None, None, None], images, 255 - images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper `bits` bits of each value; 8 keeps all."""
    step = (2 ** (8 - bits)).to(torch.uint8)[:, None, None, None]
    return images // step * step


def _blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Interpolate from `other` (factor 0) to the image (factor 1) and beyond, clamped to 0..255."""
    start = other.float()
    return (start + factor.float()[:, None, None, None] * (images.float() - start)).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Luma uint8 [N, 1, H, W] by ITU-R 601, rounded in 16 fractional bits; one channel is returned as it is."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + ONE // 2) >> 16).to(torch.uint8)[:, None]


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Change the saturation: factor 0 gives grey, 1 keeps the image."""
    return _blend(_grey(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Change the contrast: factor 0 gives the mean grey, 1 keeps the image."""
    mean = (_grey(images).double().mean((1, 2, 3)) + 0.5).floor()
    return _blend(mean[:, None, None, None], images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Change the brightness: factor 0 gives black, 1 keeps the image."""
    return _blend(torch.zeros_like(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Change the sharpness: factor 0 gives the image smoothed by 3x3, 1 keeps the image.

    The smoothing weights the centre 5 and its neighbours 1 each. Pixels at the border stay unchanged.
    """
    if min(images.shape[2:]) < 3:
        return images
    around = F.avg_pool2d(images.float(), 3, 1, divisor_override=1)
    inside = images[:, :, 1:-1, 1:-1].float()
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = ((around + 4 * inside) / 13 + 0.5).floor().to(torch.uint8)
    return _blend(smooth, images, factor)


def _histogram(images: Tensor) -> Tensor:
    """Number of pixels with each value, int64 [N, C, 256]."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, flat, torch.ones_like(flat))


def _looked_up(images: Tensor, table: Tensor) -> Tensor:
    """Replace each value by its entry in its channel's `table` [N, C, 256]."""
    return table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a constant channel stays. `strength` is ignored."""
    present = _histogram(images) > 0
    low = present.int().argmax(2, keepdim=True)
    high = 255 - present.flip(2).int().argmax(2, keepdim=True)
    level = torch.arange(256, dtype=torch.float64, device=images.device)
    # `255 / x` would multiply by the reciprocal, and so round twice.
    scale = torch.div(torch.full_like(level[:1], 255), (high - low).clamp_min(1).double())
    table = (level * scale + -low * scale).trunc().clamp(0, 255)
    return _looked_up(images, torch.where(high > low, table, level))


def equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Equalise the histogram of each channel. `strength` is ignored."""
    counts = _histogram(images)
    last = 255 - (counts > 0).flip(2).int().argmax(2, keepdim=True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)) // 255
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp_min(1)).clamp(0, 255)
    level = torch.arange(256, device=images.device).expand_as(table)
    return _looked_up(images, torch.where(step > 0, table, level))


def _affine(images: Tensor, matrix: tuple[Tensor | float, ...]) -> Tensor:
    """Take the pixel at (x, y) from (a x + b y + c, d x + e y + f); `matrix` is (a, b, c, d, e, f).

    Each entry is one number, or one per image [N]. Coordinates are those of pixel centres.
    """
    count, _, height, width = images.shape
    zero = torch.zeros(count, dtype=torch.float64, device=images.device)
    a, b, c, d, e, f = (zero + value for value in matrix)
    columns, rows = _source(a, b, c, images), _source(d, e, f, images)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    where = (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).flatten(1)
    taken = images.flatten(2).gather(2, where[:, None].expand(-1, images.shape[1], -1)).view_as(images)
    return torch.where(inside[:, None], taken, FILL)


def _source(along: Tensor, across: Tensor, offset: Tensor, images: Tensor) -> Tensor:
    """One source coordinate of every pixel, int64 [N, H, W]."""

    def fixed(value: Tensor) -> Tensor:
        return (value * ONE + 0.5).floor().long()[:, None, None]

    y = torch.arange(images.shape[2], device=images.device)[:, None]
    x = torch.arange(images.shape[3], device=images.device)
    return (fixed(offset + along * 0.5 + across * 0.5) + x * fixed(along) + y * fixed(across)) >> 16


def shear_x(images: Tensor, part: Tensor) -> Tensor:
    """Shear horizontally: the pixel at (x, y) comes from (x + part * y, y)."""
    return _affine(images, (1.0, part, 0.0, 0.0, 1.0, 0.0))


def shear_y(images: Tensor, part: Tensor) -> Tensor:
    """Shear vertically: the pixel at (x, y) comes from (x, y + part * x)."""
    return _affine(images, (1.0, 0.0, 0.0, part, 1.0, 0.0))


def translate_x(images: Tensor, part: Tensor) -> Tensor:
    """Shift horizontally: the pixel at (x, y) comes from (x + part * W, y)."""
    return _affine(images, (1.0, 0.0, part * images.shape[3], 0.0, 1.0, 0.0))


def translate_y(images: Tensor, part: Tensor) -> Tensor:
    """Shift vertically: the pixel at (x, y) comes from (x, y + part * H)."""
    return _affine(images, (1.0, 0.0, 0.0, 0.0, 1.0, part * images.shape[2]))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate counter-clockwise about the centre, by `degrees`."""
    height, width = images.shape[2:]
    angle = -degrees * math.pi / 180
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    return _affine(images, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y))
