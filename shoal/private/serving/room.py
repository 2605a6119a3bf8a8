"""Room at a server for making items: on its disk, and in its memory. Both are looked at before work starts."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from shoal.private.products.counts import POLYNOMIAL_BYTES
from shoal.private.products.parameters import packings
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.pool import Pool
from shoal.private.serving.options import GIB, MOST_ITEMS, ServerOptions
from shoal.private.serving.session import RefusedError

SPARE = 256 << 20
"""Bytes of a disk that items never take: the lists of used items must always have room."""
ENGINE_BYTES = 3 << 29
"""Memory of an SPU process without items: libraries, keys, and the buffers of oblivious transfers."""
COPIES = 8
"""Times that the words of one item are in memory at the peak of a batch, an estimate from above."""


class Room:
    """The room of one server below `root`, where all its pools are, those of other programs too."""

    def __init__(self, root: Path, options: ServerOptions) -> None:
        self.root, self.options = root, options
        self._guard = threading.Lock()
        self._promised: list[tuple[str, int]] = []
        self._memory = 0

    @contextlib.contextmanager
    def for_items(self, pool: Pool, identity: str, count: int) -> Iterator[None]:
        """Disk for `count` more items of this certificate's `pool`, promised until the block ends.

        Raises RefusedError beyond the limits of the pool, of the certificate, of all pools, and of the disk.
        """
        size = pool.layout.stored_bytes(False)
        # The parties could not agree on more names than fit in a message.
        require_room(pool, count, min(self.options.pool_bytes // max(1, size), MOST_ITEMS))
        promise = (identity, count * size)
        with self._guard:
            self._require_disk(*promise)
            self._promised.append(promise)
        try:
            yield
        finally:
            with self._guard:
                self._promised.remove(promise)

    def _require_disk(self, identity: str, more: int) -> None:
        held = {folder: _bytes(folder) for folder in self.root.glob("*/*-*") if folder.is_dir()}
        mine = sum(size for folder, size in held.items() if folder.name.startswith(f"{identity}-"))
        mine += sum(size for owner, size in self._promised if owner == identity)
        every = sum(held.values()) + sum(size for _, size in self._promised)
        if mine + more > self.options.certificate_bytes:
            raise RefusedError(
                f"found {mine / GIB:.3g} GiB of this certificate's items at the server; need at most "
                f"{self.options.certificate_bytes / GIB:.3g} GiB with those asked for; query first",
                "room",
            )
        free = shutil.disk_usage(self.root).free - sum(size for _, size in self._promised)
        if every + more > self.options.disk_bytes or free < more + SPARE:
            raise RefusedError(
                "found the server's disk for prepared items full; need room; query first, or ask its operator", "disk"
            )

    @contextlib.contextmanager
    def for_batch(self, layout: Layout, batch: int) -> Iterator[None]:
        """Memory for an SPU process that makes `batch` items at a time, promised until the block ends.

        Raises RefusedError when the estimate is more than the operator's limit leaves, or more than the machine has.
        """
        need = estimate_memory(layout, batch) + self._cache_bytes(layout)
        with self._guard:
            left = available_memory() if self.options.memory_bytes is None else self.options.memory_bytes - self._memory
            if need > left:
                raise RefusedError(
                    f"found {max(0, left) / GIB:.2g} GiB of memory left at the server; need about {need / GIB:.2g} GiB "
                    f"for batches of {batch}; ask for a smaller batch or try again later",
                    "memory",
                )
            self._memory += need
        try:
            yield
        finally:
            with self._guard:
                self._memory -= need

    def _cache_bytes(self, layout: Layout) -> int:
        """Bytes of the weights that SEAL's workers keep ready."""
        if self.options.products != "seal":
            return 0
        polynomials = sum(packing.weights for packing in packings(layout.program).values())
        return min(polynomials * POLYNOMIAL_BYTES, int(self.options.weight_cache_gib * GIB))


def require_room(pool: Pool, more: int, room: int) -> None:
    """Raise RefusedError unless `pool` can take `more` items, of at most `room`."""
    # Staged items take room, too: a crash or a client that left may have prevented their commit.
    have = len(pool.everything())
    if have + more > room:
        raise RefusedError(
            f"found {have} prepared items of at most {room}; need room for {more} more; query first", "room"
        )


def estimate_memory(layout: Layout, batch: int) -> int:
    """Bytes of memory, estimated from above, of an SPU process that makes `batch` items at a time."""
    item = sum(8 * math.prod(field.shape) for field in layout.fields(True))
    return ENGINE_BYTES + COPIES * batch * item


def available_memory() -> int:
    """Bytes of memory that this machine can give to new processes now."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # no Linux: all that it has


def _bytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # a query may spend it at this moment
                total += entry.stat().st_size
    return total
