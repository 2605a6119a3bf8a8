"""NumPy arrays of safetensors files, for processes that do without PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from shoal.errors import ShoalError


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file. Raises ShoalError when it is missing or damaged."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> ShoalError:
    """The error for a file of weights that cannot be read."""
    return ShoalError(
        f"found an unreadable weight file at {path} ({error}); need an intact safetensors file; make it again"
    )
