"""Images as the fixed-point words that a program computes with."""

from __future__ import annotations

import numpy as np

from shoal.errors import ShoalError
from shoal.private.program.fixed import FixedPoint
from shoal.private.program.program import Program


def encoded(program: Program, images: np.ndarray) -> np.ndarray:
    """Normalised images [N, C, H, W] as int64 words.

    Raises ShoalError for another shape, for no image, for types other than float, for NaN, and for values beyond the
    program's input limit.
    """
    shape, array = program.input_shape, np.asarray(images)
    if array.shape[1:] != shape or not len(array) or array.dtype.kind != "f":
        raise ShoalError(
            f"found {array.dtype} images of shape {array.shape}; need float [N, {', '.join(map(str, shape))}] "
            "with N >= 1; resize and normalise them as the artifact's preprocessing says"
        )
    for i, image in enumerate(array):
        check_limit(program, image, f"image {i}")
    return FixedPoint(program.fraction_bits).encode(array, "the images")


def check_limit(program: Program, image: np.ndarray, name: str) -> None:
    """Raise ShoalError, with `name` for the image, if a normalised value is beyond the program's input limit.

    Larger values could overflow the numbers inside the network, which nobody would notice: the logits would be wrong.
    """
    largest = float(np.abs(image).max(initial=0.0))
    if largest > program.input_limit:
        raise ShoalError(
            f"found a value of magnitude {largest:.6g} at {name}; need at most {program.input_limit:g}, which the "
            "artifact's calibration images allow; normalise the image with the artifact's mean and std, or compile the "
            "network again with images like this one"
        )
