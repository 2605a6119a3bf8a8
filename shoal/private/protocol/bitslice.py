"""Bits of many words as planes. Each word of plane j holds bit j of 64 values, so one AND works on 64 of them.

A plane of n bits has ceil(n / 64) uint64 words. In the planes made here, the bits beyond n are zero.
"""

from __future__ import annotations

import numpy as np

WORD = 64
_SWAPS = tuple(
    (np.uint64(shift), np.uint64(mask))
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0))
)
"""Of the transposition of 8 x 8 bits, each swap's distance and the bits that move down."""


def plane_words(count: int) -> int:
    """The number of words in a plane of `count` bits."""
    return -(-count // WORD)


def slice_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """uint64 planes [bits, plane_words(n)] of the low `bits` bits of uint64 `values` [n].

    Eight values at a time: one byte of each makes a word, whose 8 x 8 bits are transposed by three swaps of blocks
    (Hacker's Delight, section 7-3).
    """
    words, octets = plane_words(values.size), -(-bits // 8)
    raw = np.zeros((octets, words * WORD), np.uint8)
    raw[:, : values.size] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8)[:, :octets].T
    eights = raw.view("<u8")
    swap, back = np.empty_like(eights), np.empty_like(eights)
    for shift, mask in _SWAPS:
        np.right_shift(eights, shift, out=swap)
        swap ^= eights
        swap &= mask
        np.left_shift(swap, shift, out=back)
        swap ^= back
        eights ^= swap
    planes = np.ascontiguousarray(raw.reshape(octets, -1, 8).transpose(0, 2, 1))
    return planes.view("<u8").reshape(8 * octets, words)[:bits]


def pack(bits: np.ndarray) -> np.ndarray:
    """The plane of boolean `bits` [n]."""
    packed = np.packbits(bits, bitorder="little")
    if packed.size % 8:
        packed = np.concatenate([packed, np.zeros(-packed.size % 8, np.uint8)])
    return packed.view("<u8")


def unpack(plane: np.ndarray, count: int) -> np.ndarray:
    """The first `count` bits of a plane as uint64 zeros and ones [count]."""
    return bits_of(plane, count).astype(np.uint64)


def bits_of(plane: np.ndarray, count: int) -> np.ndarray:
    """The first `count` bits of a plane as int8 zeros and ones [count]."""
    octets = np.ascontiguousarray(plane).view(np.uint8)
    return np.unpackbits(octets, count=count, bitorder="little").view(np.int8)


def spread(signs: np.ndarray) -> np.ndarray:
    """int8 values [n] as the uint64 words of the same integers: -1 is all ones."""
    return signs.astype(np.int64).view(np.uint64)
