"""Images as the fixed-point words that a program computes with."""

from __future__ import annotations

import numpy as np

from shoal.errors import ShoalError
from shoal.private.program.fixed import FixedPoint
from shoal.private.program.program import Program


def encoded(program: Program, images: np.ndarray, rounded: bool = False) -> np.ndarray:
    """Normalised images [N, C, H, W] as int64 words; if `rounded`, as the float32 numbers that SPU encodes so.

    Raises ShoalError for another shape, for no image, for types other than float, and for values that are too large.
    """
    shape, array = program.input_shape, np.asarray(images)
    if array.shape[1:] != shape or not len(array) or array.dtype.kind != "f":
        raise ShoalError(
            f"found {array.dtype} images of shape {array.shape}; need float [N, {', '.join(map(str, shape))}] "
            "with N >= 1; resize and normalise them as the artifact's preprocessing says"
        )
    words = FixedPoint(program.fraction_bits).encode(array, "the images")
    if np.abs(words).max() >= 1 << 24:
        limit = 2 ** (24 - program.fraction_bits)
        raise ShoalError(f"found image values of {limit} or more; need less; normalise the images")
    if not rounded:
        return words
    return np.ascontiguousarray(words.astype(np.float64) / 2**program.fraction_bits, np.float32)
