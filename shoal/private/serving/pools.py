"""The server's pools: one for each pool of a client, by the client's certificate and the name that the client made."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
from pathlib import Path

from shoal.errors import ShoalError
from shoal.private.monitoring.metrics import Level, short_name
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.pool import READY, Pool
from shoal.private.serving.session import PeerError, RefusedError, printable

CLIENT_ID = "client-id"
LOG = logging.getLogger("shoal.private.serving.pools")


class Pools:
    """Pools of one program in `folder`. Each is opened when its client first connects, and held until `close`.

    `weights` is the digest of the server's weights; items that were made with others are dropped. A certificate may
    have at most `most` pools, because clients choose the names of their pools themselves.
    """

    def __init__(self, folder: Path, layout: Layout, weights: str, most: int) -> None:
        self.folder, self.layout, self.weights, self.most = folder, layout, weights, most
        self._open: dict[str, Pool] = {}
        self._guard = threading.Lock()

    def of(self, identity: str, name: object) -> Pool:
        """The pool of the client with this certificate and name.

        Raises PeerError for a malformed name, RefusedError when the certificate already has the most pools.
        """
        if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{16}", name):
            raise PeerError(f"found client name {printable(name, 40)}; need 16 hex digits; need a shoal client there")
        key = f"{identity}-{name}"
        with self._guard:
            if key not in self._open:
                self._require_room(identity, key)
                self._open[key] = self._opened(key)
            return self._open[key]

    def _opened(self, key: str) -> Pool:
        pool = Pool(self.folder / key, self.layout, False, weights=self.weights)
        if pool.dropped:
            LOG.warning(
                "found %d prepared items of other weights or another version in the pool of %s; dropped them",
                pool.dropped,
                short_name(key),
            )
        return pool

    def _require_room(self, identity: str, key: str) -> None:
        others = [path for path in self.folder.glob(f"{identity}-*") if path.name != key]
        if len(others) >= self.most:
            raise RefusedError(
                f"found {len(others)} pools of this certificate at the server; need fewer than {self.most} for one "
                "more; go on with a pool that you have, or ask the server's operator to remove some",
                "pools",
            )

    def levels(self) -> dict[str, Level]:
        """How full every pool on disk is, by its client's short name, also for clients that have not connected yet."""
        return {short_name(folder.name): _level(folder) for folder in self.folder.glob("*-*")}

    def close(self) -> None:
        """Release all pools."""
        with self._guard:
            for pool in self._open.values():
                pool.close()
            self._open.clear()


def _level(folder: Path) -> Level:
    items = size = 0
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):  # a query may spend it at this moment
            size += path.stat().st_size
            items += path.suffix == READY
    return Level(items, size)


def own_name(root: Path) -> str:
    """The name of the pool at `root`, 16 hex digits; the first process that asks makes it.

    A server keeps a client's pool under this name, so that several pools of one certificate do not mix.

    Raises ShoalError for a damaged file, and when it cannot be written.
    """
    path = root / CLIENT_ID
    try:
        if not path.exists():
            _make(path)
        name = path.read_text().strip()
    except OSError as error:
        raise ShoalError(f"found no way to keep a name at {path} ({error}); need a writable folder; mend it") from error
    if not re.fullmatch("[0-9a-f]{16}", name):
        raise ShoalError(f"found {name[:40]!r} at {path}; need 16 hex digits; remove it and the pool")
    return name


def _make(path: Path) -> None:
    """Write the file whole or not at all; of several processes that do it at once, the first one's name stays."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(8))
            file.flush()
            os.fsync(handle)
        with contextlib.suppress(FileExistsError):
            os.link(scratch, path)
    finally:
        scratch.unlink()
