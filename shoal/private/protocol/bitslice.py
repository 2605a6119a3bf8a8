"""Bits of many words as planes. Each word of plane j holds bit j of 64 values, so one AND works on 64 of them.

A plane of n bits has ceil(n / 64) uint64 words. In the planes made here, the bits beyond n are zero.
"""

from __future__ import annotations

import numpy as np

WORD = 64


def plane_words(count: int) -> int:
    """The number of words in a plane of `count` bits."""
    return -(-count // WORD)


def slice_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """uint64 planes [bits, plane_words(n)] of the low `bits` bits of uint64 `values` [n]."""
    planes = np.zeros((bits, plane_words(values.size) * 8), np.uint8)
    # Half the width is half the memory traffic, which takes nearly all of the time here.
    narrow = values.astype(np.uint32) if bits <= 32 else values
    for j in range(bits):
        packed = np.packbits((narrow & narrow.dtype.type(1 << j)) != 0, bitorder="little")
        planes[j, : packed.size] = packed
    return planes.view("<u8")


def pack(bits: np.ndarray) -> np.ndarray:
    """The plane of boolean `bits` [n]."""
    plane = np.zeros(plane_words(bits.size) * 8, np.uint8)
    packed = np.packbits(bits, bitorder="little")
    plane[: packed.size] = packed
    return plane.view("<u8")


def unpack(plane: np.ndarray, count: int) -> np.ndarray:
    """The first `count` bits of a plane as uint64 zeros and ones [count]."""
    return np.unpackbits(np.ascontiguousarray(plane).view(np.uint8), count=count, bitorder="little").astype(np.uint64)
