"""Searches bytes and a process's memory for runs of words that are no accident."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

RUN = 4
"""Consecutive words, none of them zero. Four words of a kernel or an image are met by chance in no number of runs."""
PIECE, PAGE = 1 << 24, 1 << 12
FACTORS = np.random.default_rng(7).integers(1 << 62, 1 << 63, RUN, np.uint64) * np.uint64(2) + np.uint64(1)


def _kind(words: np.ndarray) -> np.ndarray:
    """One of 65,536 kinds for each word, of 4 or 8 bytes."""
    scattered = words * words.dtype.type(0x9E3779B97F4A7C15 & (1 << 8 * words.itemsize) - 1)
    return (scattered >> words.dtype.type(8 * words.itemsize - 16)).astype(np.int64)


def _hashes(words: np.ndarray) -> np.ndarray:
    """A linear hash of each run of words."""
    total = np.zeros(max(0, len(words) - RUN + 1), np.uint64)
    for i, factor in enumerate(FACTORS):
        total += words[i : len(words) - RUN + 1 + i] * factor
    return total


class Secrets:
    """Arrays to search for, by name; every one of 4 or 8 bytes a value, in its own order of axes and channels last."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.known: dict[tuple[str, int], np.ndarray] = {}
        self.quick = {size: np.zeros(1 << 16, bool) for size in (4, 8)}
        for name, array in arrays.items():
            layouts = (array, np.moveaxis(array, -3, -1), np.moveaxis(array, (0, 1), (-1, -2)))
            words = [np.ascontiguousarray(a).ravel().view(f"<u{a.itemsize}").astype(np.uint64) for a in layouts]
            good = [np.flatnonzero(_hashes((w == 0).astype(np.uint64)) == 0) for w in words]
            runs = [_hashes(w)[where] for w, where in zip(words, good, strict=True)]
            self.known[name, array.itemsize] = np.unique(np.concatenate(runs))
            assert self.known[name, array.itemsize].size
            for w, where in zip(words, good, strict=True):
                self.quick[array.itemsize][_kind(w[where].astype(f"<u{array.itemsize}"))] = True

    def within(self, data: bytes, step: int = 1, every: int = 1) -> set[str]:
        """Names of those that have a run in `data` at an offset that is a multiple of `step`.

        Looks at one word in `every`, which finds whatever has `every` runs one after the other.
        """
        names: set[str] = set()
        for size in (4, 8):
            for offset in range(0, size, step):
                few = self._candidates(
                    np.frombuffer(data, f"<u{size}", max(0, len(data) - offset) // size, offset), every
                )
                names |= {n for (n, s), known in self.known.items() if s == size and np.isin(few, known).any()}
        return names

    def _candidates(self, words: np.ndarray, every: int) -> np.ndarray:
        """Hashes of the runs that begin with the first word of a known run, or with one of its kind; few do."""
        starts = every * np.flatnonzero(self.quick[words.itemsize][_kind(words[::every])])
        starts = starts[starts <= len(words) - RUN]
        runs = words[starts[:, None] + np.arange(RUN)].astype(np.uint64)
        return (runs * FACTORS).sum(1, dtype=np.uint64)

    def within_process(self, pid: int) -> set[str]:
        """Names of those that have a run in its writable memory. Skips the test where the kernel lets nobody look."""
        found, seen = set[str](), 0
        for piece in _memory(pid):
            found |= self.within(_touched(piece), 8, RUN)
            seen += len(piece)
        assert seen > 1 << 23, "hardly any memory was read"
        return found


def _touched(piece: bytes) -> bytes:
    """The piece without pages of nothing but zeros, which are most of a process's memory and end every run."""
    pages = np.frombuffer(piece, np.uint64, len(piece) // PAGE * PAGE // 8).reshape(-1, PAGE // 8)
    return pages[pages.any(1)].tobytes() + piece[pages.nbytes :]


def _memory(pid: int) -> Iterator[bytes]:
    """Its writable memory in pieces; the last words of a piece begin the next."""
    with contextlib.ExitStack() as stack:
        try:
            memory = stack.enter_context(Path(f"/proc/{pid}/mem").open("rb", buffering=0))
        except PermissionError:
            pytest.skip("this kernel does not let a process read the memory of its own child")
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            region, mode = line.split()[:2]
            if not mode.startswith("rw"):
                continue
            start, end = (int(part, 16) for part in region.split("-"))
            while start < end:
                with contextlib.suppress(OSError):  # a guard page, or memory that was given back meanwhile
                    memory.seek(start)
                    yield memory.read(min(end - start, PIECE))
                start += PIECE - 8 * RUN if end - start > PIECE else PIECE
