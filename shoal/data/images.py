"""One set of rules by which an image file becomes pixels: for class folders, `shoal query` and Python programs.

`read_image` documents the rules. Pillow decodes all formats but DICOM, which is in `shoal.data.dicom`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shoal.data.dicom import is_dicom, read_dicom
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from PIL import Image

STRETCH = "stretch"
FITS = {
    STRETCH: "resize to the size, without keeping the aspect ratio",
    "crop": "scale until the shorter side fits, and cut out the centre",
    "pad": "scale until the longer side fits, and fill the rest with black",
}
"""The rules that bring images to a size, and what they mean."""
CHANNELS = {1: "L", 3: "RGB"}
"""Numbers of channels that images can have, and Pillow's mode for each."""
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
"""Pillow's modes that are converted as by torchvision's `ImageFolder`."""
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Pillow's modes of grey values from 0 to 65535."""

# Pillow only recognises some of these and cannot decode them. For EPS it would run another program, Ghostscript.
_NOT_DECODED = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS")
_ORIENTATION = 0x0112
"""Number of the EXIF tag that says how an image must be turned."""


@dataclass(frozen=True)
class Frame:
    """What the images of a set have in common: channels, size (height, width) or None for their own, and rule."""

    channels: int = 3
    size: tuple[int, int] | None = None
    fit: str = STRETCH

    def read(self, path: Path) -> np.ndarray:
        """`read_image` with these arguments."""
        return read_image(path, self.channels, size=self.size, fit=self.fit)


def read_image(
    path: Path | str, channels: int = 3, *, size: tuple[int, int] | None = None, fit: str = STRETCH
) -> np.ndarray:
    """The pixels of an image file, uint8 [C, H, W] with C = `channels`, which is 1 (grey) or 3 (red, green, blue).

    Any file that Pillow can decode by itself is read, and DICOM files with the extra `dicom`. The rules:

    - 8 bits per channel (Pillow's modes L, LA, P, PA, RGB, RGBA, RGBX, CMYK, YCbCr, HSV) and 1 bit (mode 1): converted
      as by torchvision's `ImageFolder`, with `convert("RGB")` or `convert("L")`. Transparency is dropped.
    - Grey with 16 bits (modes I;16, I;16L, I;16B, I;16N, and I with values from 0 to 65535): divided by 257, rounded.
      Pillow has no colour with 16 bits per channel; it reads such files as RGB with the upper 8 bits.
    - Other values in mode I, and the modes F (floats), LAB, La and RGBa: refused.
    - DICOM: one slice, as grey (see `shoal.data.dicom.read_dicom`).
    - The orientation in EXIF data is applied. EXIF data that cannot be read count as none.
    - Of files with several images or pages, the first is taken.

    `size` is (height, width); by default images keep their size. `fit` is the rule for images of another size, which
    are resized bilinearly: ``stretch`` does not keep the aspect ratio; ``crop`` scales until the shorter side fits
    and cuts out the centre, as torchvision's Resize and CenterCrop do; ``pad`` scales until the longer side fits, and
    centres the image on black.

    Raises ShoalError for a file that is unreadable or refused, and for other channels, sizes and rules.
    """
    check_frame(channels, size, fit)
    path = Path(path)
    try:
        image = _grey(read_dicom(path)) if is_dicom(path, image_suffixes()) else _decoded(path)
        image = image.convert(CHANNELS[channels])
        pixels = np.asarray(image if size is None else _fitted(image, size, fit))
    except ShoalError:
        raise
    except Exception as error:  # Pillow raises a dozen types for damaged files
        raise ShoalError(
            f"found no readable image at {path} ({error}); need a whole image file, such as PNG or JPEG; replace or "
            "remove the file"
        ) from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def check_frame(channels: int, size: tuple[int, int] | None, fit: str) -> None:
    """Raise ShoalError unless `read_image` can make images with these arguments."""
    if channels not in tuple(CHANNELS):
        raise ShoalError(f"found {channels} at channels; need 1 (grey) or 3 (colour); give one of these")
    if size is not None and min(size) < 1:
        raise ShoalError(f"found {size[0]}x{size[1]} at size; need 1 or more pixels; give 224, say")
    if fit not in tuple(FITS):
        raise ShoalError(f"found {fit!r} at fit; need one of {', '.join(FITS)}; choose one")


def image_suffixes() -> set[str]:
    """Suffixes, in lower case, of the image files that Pillow can decode, such as ``.png``."""
    from PIL import Image

    formats = {*image_formats(), "MPO"}  # JPEG's plugin opens MPO, which has its own name once it is open
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def image_formats() -> list[str]:
    """Pillow's names of the formats that it can decode by itself."""
    from PIL import Image

    Image.init()
    return [name for name in Image.ID if name not in _NOT_DECODED]


# ---- the rules of modes


def _decoded(path: Path) -> Image.Image:
    """The first image in a file, turned upright, in a mode that converts to grey and colour without a warning."""
    from PIL import Image  # imported here, because the other sets do not need Pillow

    with Image.open(path, formats=image_formats()) as image:
        image.load()
        # Pillow would convert the transparent colour, too, and warn if there are several.
        image.info.pop("transparency", None)
        if image.mode in SIXTEEN_BITS:
            plain = _grey(_eight_bits(np.asarray(image), path))
        elif image.mode in EIGHT_BITS:
            plain = image.copy()
        else:
            raise ShoalError(
                f"found an image of Pillow's mode {image.mode} at {path}; need 8 bits per channel, or grey with 16; "
                "scale the values to 0 to 255 and save it as PNG"
            )
        turn = _turn(image)
    return plain if turn is None else plain.transpose(turn)


def _grey(pixels: np.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels, np.uint8))


def _eight_bits(values: np.ndarray, path: Path) -> np.ndarray:
    """Grey values 0..65535 as uint8. Raises ShoalError, naming the file, for values out of this range."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ShoalError(
            f"found grey values from {low} to {high} at {path}; need 0 to 65535; scale them to this range and save the "
            "image again"
        )
    return (values.astype(np.uint32) + 128) // 257


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright, from its EXIF data; None if it is upright, or nothing says that it is not."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises SyntaxError, struct.error and others; the pixels themselves are fine
        return None


# ---- sizes


def _fitted(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    """`image` brought to `size` (height, width) by the rule `fit`."""
    from PIL import Image

    height, width = size
    if image.size == (width, height):
        return image
    if fit == STRETCH:
        return image.resize((width, height), Image.Resampling.BILINEAR)
    scaled = image.resize(_scaled(image.size, (width, height), fit == "crop"), Image.Resampling.BILINEAR)
    if fit == "crop":
        left, top = round((scaled.width - width) / 2), round((scaled.height - height) / 2)
        return scaled.crop((left, top, left + width, top + height))
    black = Image.new(image.mode, (width, height))
    black.paste(scaled, ((width - scaled.width) // 2, (height - scaled.height) // 2))
    return black


def _scaled(own: tuple[int, int], size: tuple[int, int], outside: bool) -> tuple[int, int]:
    """The size (width, height) with the proportions of `own` that covers `size`, or fits into it, with one side equal.

    The other side is rounded down, as in torchvision's Resize, but is at least 1.
    """
    wider = own[0] * size[1] >= own[1] * size[0]
    if wider == outside:
        return max(1, own[0] * size[1] // own[1]), size[1]
    return size[0], max(1, own[1] * size[0] // own[0])
