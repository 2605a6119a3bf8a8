"""Pools of correlated randomness on disk. Each item serves one inference, once.

An item has the same name at both parties. It is staged (written), committed when both parties have it, and claimed by
a rename. A claimed item is read, its name is entered in the ledger of spent names, and its file is deleted before its
holder sends a byte; a crash after the claim loses the item. Files are safetensors with mode 0600, in folders with mode
0700.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from shoal.errors import ShoalError
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.randomness import Half

NAME = re.compile(r"[0-9a-f]{32}-[0-9]{6}")
PLAN_VERSION = "shoal-item-1"
"""The format of an item: which arrays it has, in which order they come from the seed, and how both parties use them."""
READY, STAGED, CLAIMED, LEDGER, SEED = ".item", ".staged", ".claimed", "spent", "seed"
LOCK_POLL = 0.05


class Pool:
    """One party's items for one program and one peer, in `folder`.

    `spent` holds all names that were ever claimed here. Opening a pool destroys items that a crash left claimed, and
    items made for other weights than those with the digest `weights` (the server's) or by another version; `dropped` is
    the number of the latter. Items that were staged but not committed wait for `agree`. Raises ShoalError when another
    process holds the folder for longer than `wait_s` seconds, and from all methods in a process forked from its own.
    """

    def __init__(
        self, folder: Path | str, layout: Layout, client: bool, wait_s: float = 0.0, weights: str = ""
    ) -> None:
        self.folder, self.layout, self.client = Path(folder), layout, client
        self.digest, self.weights = layout.program.digest(), weights
        self._process = os.getpid()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._turn = threading.RLock()
        self._lock: int | None = self._hold(wait_s)
        self.fresh: set[str] = set()
        self.asked: set[str] = set()
        ledger = self.folder / LEDGER
        try:
            self.spent = set(ledger.read_text().split()) if ledger.exists() else set()
            for path in self.folder.glob(f"*{CLAIMED}"):
                self._spend(path)
            self._sweep()
            self.dropped = self._drop_others()
        except BaseException:
            self.close()  # this process may try again
            raise

    def _hold(self, wait_s: float) -> int:
        """Take the lock once it is free. Waiting processes share a second lock, by which `wanted` sees them."""
        handle, limit = _opened(self.folder / "lock"), time.monotonic() + wait_s
        with contextlib.closing(os.fdopen(_opened(self.folder / "wanted"), "wb")) as wanted:
            fcntl.flock(wanted, fcntl.LOCK_SH)
            while not _locked(handle):
                if time.monotonic() >= limit:
                    os.close(handle)
                    raise ShoalError(
                        f"found the pool {self.folder} in use by another process; need it alone; give each client "
                        "its own"
                    )
                time.sleep(LOCK_POLL)
        return handle

    def _drop_others(self) -> int:
        """Delete items that no query here can use: of another program, weights or version; returns how many."""
        dropped = 0
        for path in [*self.folder.glob(f"*{READY}"), *self.folder.glob(f"*{STAGED}")]:
            with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="np") as file:
                if file.metadata() != self._facts(path.stem):
                    path.unlink()
                    dropped += 1
        return dropped

    def _facts(self, name: str) -> dict[str, str]:
        return _facts(name, self.digest, self.client, self.weights)

    def require_owner(self) -> None:
        """Raise ShoalError in a process forked from the one that opened this pool: both would spend its items."""
        if os.getpid() != self._process:
            raise ShoalError(
                f"found the pool {self.folder} opened by the process that this one was forked from; need one process; "
                "open it in that process only, or after the fork"
            )

    def _sweep(self) -> None:
        """Remove files that a crash left half written. No other process may be writing now."""
        for path in self.folder.glob(".*"):
            path.unlink()

    def wanted(self) -> bool:
        """Whether another process waits for this pool. A process that only refills it should then close it."""
        with contextlib.closing(os.fdopen(_opened(self.folder / "wanted"), "wb")) as file:
            return not _locked(file.fileno())

    def close(self) -> None:
        """Release the folder. May be called again."""
        with self._turn:
            if self._lock is not None:
                os.close(self._lock)  # only once: the number may belong to another file afterwards
            self._lock = None

    def names(self) -> list[str]:
        """Names of the ready items, oldest first."""
        return sorted(self._kept(READY), key=lambda name: (self._age(name), name))

    def _kept(self, kind: str) -> list[str]:
        """Usable names on disk. A spent name is not usable: its file is a copy that somebody put back."""
        found = [path.stem for path in self.folder.glob(f"*{kind}")]
        return [name for name in found if NAME.fullmatch(name) and name not in self.spent]

    def _age(self, name: str) -> int:
        with contextlib.suppress(OSError):
            return (self.folder / f"{name}{READY}").stat().st_mtime_ns
        return 0

    def bytes(self) -> int:
        """Bytes of the ready items on disk."""
        return sum((self.folder / f"{name}{READY}").stat().st_size for name in self.names())

    @contextlib.contextmanager
    def making(self) -> Iterator[Callable[[list[str]], None]]:
        """Yields a function to call with the names of items before they are made.

        Until the block ends, `agree` keeps these items although the peer of another session may not know them yet.
        The function raises ShoalError for names that were used before.
        """
        self.require_owner()
        mine: set[str] = set()

        def expect(names: list[str]) -> None:
            for name in names:
                if _checked(name) in self.spent or name in self.everything():
                    raise ShoalError(f"found item {name} made before; need a fresh name; use another client's folder")
            mine.update(names)
            self.fresh.update(names)

        try:
            yield expect
        finally:
            self.fresh -= mine

    @contextlib.contextmanager
    def asking(self, name: str) -> Iterator[None]:
        """Within the block only one party may have claimed `name`; agreements of other sessions keep both halves."""
        self.asked.add(name)
        try:
            yield
        finally:
            self.asked.discard(name)

    def listed(self) -> list[str]:
        """The names to tell the peer for an agreement: items being asked for come first, then all others."""
        asked = list(self.asked)
        return [*asked, *(name for name in self.everything() if name not in asked)]

    def staged(self) -> list[str]:
        """Names of the items that are staged and not committed."""
        return sorted(self._kept(STAGED))

    def commit(self, names: Iterable[str]) -> None:
        """Make these staged items ready; the peer must have them, too."""
        self.require_owner()
        with self._turn:
            for name in names:
                (self.folder / f"{_checked(name)}{STAGED}").rename(self.folder / f"{name}{READY}")
            flush(self.folder)

    def agree(self, theirs: Iterable[str]) -> list[str]:
        """Keep only the items that the peer has, too, whether staged or ready; returns the names that are ready now."""
        self.require_owner()
        with self._turn:
            common = {_checked(name) for name in theirs} & set(self.everything())
            self.commit(name for name in self.staged() if name in common - self.fresh)
            for path in [*self.folder.glob(f"*{STAGED}"), *self.folder.glob(f"*{READY}")]:
                if path.stem not in common | self.fresh | self.asked:
                    path.unlink()
            if not self.fresh:
                self._sweep()
            flush(self.folder)
            return self.names()

    def everything(self) -> list[str]:
        """Names of all items, ready or staged."""
        return [*self.names(), *self.staged()]

    def look(self, name: object) -> Half:
        """Read a ready item before it is claimed. It stays ready; nothing that depends on it may be sent.

        Raises ShoalError for an item that does not exist, is damaged, or belongs to another program.
        """
        return self._read(self.folder / f"{_checked(name)}{READY}", _checked(name))

    def claim(self, name: object, read: Half | None = None) -> Half:
        """Take an item. When this returns, its file is deleted and its name is spent.

        `read` is the item as `look` returned it, which saves reading it again.

        Raises ShoalError for an item that does not exist, was used before, or belongs to another program,
        other weights or another version.
        """
        self.require_owner()
        name = _checked(name)
        path, taken = self.folder / f"{name}{READY}", self.folder / f"{name}{CLAIMED}"
        with self._turn:
            if name in self.spent:
                path.unlink(missing_ok=True)
                raise ShoalError(f"found item {name} used already; need a fresh one; prepare more")
            try:
                path.rename(taken)
            except OSError as error:
                raise ShoalError(f"found no item {name} ready; need one; prepare more") from error
            try:
                return self._read(taken, name) if read is None else read
            finally:
                self._spend(taken)

    def _read(self, path: Path, name: str) -> Half:
        try:
            with safe_open(path, framework="np") as file:
                facts = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise ShoalError(f"found item {name} unreadable ({error}); need it intact; query again") from error
        if facts != self._facts(name):
            raise ShoalError(
                f"found another item, program, weights or version at {name}; need what was prepared; prepare again"
            )
        seed = arrays.pop(SEED, np.empty(0, np.uint8)).tobytes()
        return Half(seed, arrays, self.layout.fields(self.client))

    def _spend(self, path: Path) -> None:
        """Enter the name in the ledger, then delete the file. Both are on disk when this returns."""
        self.spent.add(path.stem)
        try:
            handle = os.open(self.folder / LEDGER, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "a") as ledger:
                # A crash or a full disk may have cut the last name short; this one begins on a new line.
                ledger.write(f"\n{path.stem}\n")
                ledger.flush()
                os.fsync(handle)
            path.unlink(missing_ok=True)
            flush(self.folder)
        except OSError as error:
            raise ShoalError(
                f"found no way to enter item {path.stem} as used at {self.folder} ({error}); need room; free it"
            ) from error


def ready_names(folder: Path) -> list[str]:
    """Names of the ready items in a pool's folder. Another process may hold the pool."""
    return [path.stem for path in folder.glob(f"*{READY}") if NAME.fullmatch(path.stem)]


def _opened(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR, 0o600)


def _locked(handle: int) -> bool:
    """Lock this file if that is possible at once; returns whether it was."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def stage(folder: Path, name: str, half: Half, digest: str, client: bool, weights: str = "") -> None:
    """Write an item that is not ready yet. Raises ShoalError when the disk is full; finished items stay.

    `digest` is the program's, `weights` that of the server's weights (empty at the client).
    """
    # The peer may have staged its half already, so a partly written file must not have the item's name.
    path, scratch = folder / f"{_checked(name)}{STAGED}", folder / f".{name}.tmp"
    arrays = half.stored | {SEED: np.frombuffer(half.seed, np.uint8)}
    try:
        scratch.touch(0o600)
        save_file(
            {k: np.ascontiguousarray(v) for k, v in arrays.items()}, scratch, _facts(name, digest, client, weights)
        )
        # The writer may have replaced the file by one with the usual mode.
        scratch.chmod(0o600)
        flush(scratch)
        scratch.rename(path)
    except (OSError, SafetensorError) as error:
        scratch.unlink(missing_ok=True)
        raise ShoalError(f"found no room to keep prepared items at {folder} ({error}); need some; free it") from error


def _facts(name: str, digest: str, client: bool, weights: str) -> dict[str, str]:
    party = "client" if client else "server"
    return {"plan": PLAN_VERSION, "name": name, "program": digest, "party": party, "weights": weights}


def _checked(name: object) -> str:
    """A name from a peer, checked: it becomes part of a path."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ShoalError(f"found {str(name)[:60]!r} as the name of a prepared item; need a shoal party there")
    return name


def flush(path: Path) -> None:
    """Make sure that a file or folder is on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
