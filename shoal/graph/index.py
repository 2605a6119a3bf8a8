"""The index of a `take`: the positions that it keeps of each dimension. It needs no PyTorch."""

from __future__ import annotations

from typing import Any


def check_index(index: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `index` has, for each dimension of `shape`, a list of valid positions or None (all)."""
    if not isinstance(index, list) or len(index) != len(shape):
        raise ValueError(f"an index whose number of dimensions is not that of {shape}")
    for size, positions in zip(shape, index, strict=True):
        if positions is not None and (not positions or any(type(p) is not int or not 0 <= p < size for p in positions)):
            raise ValueError(f"positions outside 0..{size - 1}")
