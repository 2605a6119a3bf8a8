"""Reads the slice in a DICOM file as a grey image, through pydicom (the extra `dicom`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.errors import ShoalError

DICOM_SUFFIXES = (".dcm", ".dicom")
"""Suffixes of DICOM files. Many have none, or end in the digits of an identifier."""

_PREAMBLE = 128
_MAGIC = b"DICM"
_INVERTED = "MONOCHROME1"
_GREY = (_INVERTED, "MONOCHROME2")


def is_dicom(path: Path, others: Collection[str] = ()) -> bool:
    """Whether `path` is a DICOM file: by its suffix, or by its content if its suffix is not among `others`."""
    suffix = path.suffix.lower()
    return suffix in DICOM_SUFFIXES or (suffix not in others and _has_magic(path))


def is_unnamed_dicom(path: Path) -> bool:
    """Whether `path` is a DICOM file without a suffix, or with digits in its place, as in 1.2.840.113619.2."""
    suffix = path.suffix[1:]
    return (not suffix or suffix.isdigit()) and _has_magic(path)


def _has_magic(path: Path) -> bool:
    """Whether the file starts as DICOM files do; not if it cannot be read, as nothing else says that it is an image."""
    try:
        with path.open("rb") as file:
            return file.read(_PREAMBLE + len(_MAGIC))[_PREAMBLE:] == _MAGIC
    except OSError:
        return False


def read_dicom(path: Path) -> np.ndarray:
    """The slice in a DICOM file as grey values, uint8 [H, W]; `grey_values` has the rules.

    Raises ShoalError without the package pydicom, and as `grey_values` does; pydicom's own errors for files that it
    cannot read.
    """
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise ShoalError(
            f"found a DICOM file at {path} and no package pydicom; need it to read the file; pip install shoal[dicom]"
        ) from error
    return grey_values(dcmread(path), str(path))


def grey_values(dataset: Any, where: str) -> np.ndarray:
    """The slice in a pydicom `Dataset` as grey values, uint8 [H, W].

    Stored values are multiplied by the rescale slope, and the rescale intercept is added, where they are given. The
    first window is then mapped to 0..255 by the linear function of DICOM PS3.3 C.11.2.1.2; without a window, the
    smallest to the largest value. MONOCHROME1, in which low values are bright, is inverted.

    Raises ShoalError, naming the file `where`, for several frames, for colour, and for lookup tables in place of a
    slope or a window.
    """
    _check_plain(dataset, where)
    slope, intercept = _number(dataset, "RescaleSlope", 1.0), _number(dataset, "RescaleIntercept", 0.0)
    values = np.asarray(dataset.pixel_array, np.float64) * slope + intercept
    centre, width = _number(dataset, "WindowCenter", None), _number(dataset, "WindowWidth", None)
    if centre is None or width is None:
        low, high = float(values.min()), float(values.max())
    elif not width >= 1:
        raise _refused(f"a window of width {width:g}", where, "1 or more")
    else:
        low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    # A window of width 1 is a step, and an image of one value is black.
    part = np.clip((values - low) / (high - low), 0, 1) if high > low else (values > low).astype(np.float64)
    grey = (part * 255).round().astype(np.uint8)
    return 255 - grey if dataset.get("PhotometricInterpretation") == _INVERTED else grey


def _check_plain(dataset: Any, where: str) -> None:
    """Raise ShoalError unless `dataset` is one grey slice with a linear window."""
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise _refused(f"{frames} frames", where, "one slice per file; write each frame to a file of its own")
    kind = dataset.get("PhotometricInterpretation")
    if kind not in _GREY:
        raise _refused(f"pixels of type {kind}", where, f"{' or '.join(_GREY)}; convert the file to PNG")
    if dataset.get("ModalityLUTSequence") or (dataset.get("VOILUTSequence") and not dataset.get("WindowCenter")):
        raise _refused("a lookup table of grey values", where, "a rescale slope and a window; convert the file to PNG")
    function = dataset.get("VOILUTFunction") or "LINEAR"
    if function != "LINEAR":
        raise _refused(f"a window of form {function}", where, "LINEAR; convert the file to PNG")


def _refused(found: str, where: str, need: str) -> ShoalError:
    return ShoalError(f"found {found} at {where}; need {need}")


def _number(dataset: Any, name: str, default: Any) -> Any:
    """The number in an element, the first if there are several; `default` if there is none."""
    value = dataset.get(name)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else None
    return default if value in (None, "") else float(value)
