"""Raw shares: what is written is read back, whatever the words and the shape; other layouts are refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ShoalError
from shoal.private.engine.shares import replaced, words

# Recorded from SPU 0.9.5: a secret float32 value of shape [64, 16], stored as an additive share.
META = b'\x08\x0b\x18\x01"\x04\n\x02@\x10*\x12cheetah.AShr<FM64>'


def like(meta: bytes = META) -> SimpleNamespace:
    return SimpleNamespace(meta=meta, share_chunks=[])


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=400))
def test_words_survive(values: list[int]) -> None:
    flat = np.array(values, dtype=np.uint64)
    share = replaced(like(), flat, (len(values),), like())
    assert np.array_equal(words(share), flat)


def test_the_recorded_meta_is_reproduced_to_the_byte() -> None:
    share = replaced(like(), np.zeros(1024, np.uint64), (64, 16), like())
    assert share.meta == META


def test_wrong_sizes_and_storage_are_refused() -> None:
    with pytest.raises(ShoalError, match="3 words for a value of shape"):
        replaced(like(), np.zeros(3, np.uint64), (2, 2), like())
    boolean = like(META.replace(b"AShr", b"BShr"))
    with pytest.raises(ShoalError, match="BShr"):
        words(boolean)
    share = replaced(like(), np.zeros(4, np.uint64), (4,), like())
    share.share_chunks = [share.share_chunks[0][:-8].replace(b"\x08\x20\x1a\x20", b"\x08\x20\x1a\x18")]
    with pytest.raises(ShoalError, match="24 of 32 bytes"):
        words(share)
