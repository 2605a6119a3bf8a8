"""A budget of queries for each certificate, kept in a file that outlives the server.

A client that deviates from the protocol learns something of the weights by each query, so their number is limited.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from shoal.errors import ShoalError
from shoal.private.serving.session import RefusedError
from shoal.storage.files import read_json, write_text

FILE = "budget.json"


class Budget:
    """Answers at most `most` queries of each certificate, counted in `folder`; no limit for `most` 0.

    The file maps the first 16 hex digits of a certificate's fingerprint to the number of items that it has spent. It is
    read again for each query, so an operator may edit it while the server runs; to remove an entry gives that
    certificate a new budget. A file that cannot be read lets no query through.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self._turn = threading.Lock()

    def require(self, identity: str) -> None:
        """Raise RefusedError when this certificate has no query left."""
        if self.most and read_spent(self.folder).get(identity, 0) >= self.most:
            raise self._refused()

    def spend(self, identity: str) -> None:
        """Count one more query; the count is on disk when this returns. Raises RefusedError beyond the budget."""
        with self._turn, self._alone():
            spent = read_spent(self.folder)
            if self.most and spent.get(identity, 0) >= self.most:
                raise self._refused()
            spent[identity] = spent.get(identity, 0) + 1
            write_text(self.folder / FILE, json.dumps(spent, indent=1, sort_keys=True) + "\n")

    def _refused(self) -> RefusedError:
        return RefusedError(
            f"found the {self.most} queries of this certificate's budget used up; need a new budget; ask the server's "
            "operator",
            "budget",
        )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process that serves from this folder counts at the same time."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(self.folder / f"{FILE}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def read_spent(folder: Path) -> dict[str, int]:
    """The queries that each certificate has spent; none without a file. Raises ShoalError for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return {}
    spent = read_json(path)
    if not isinstance(spent, dict) or not all(_is_count(value) for value in spent.values()):
        raise ShoalError(f"found no counts of queries at {path}; need a JSON object of whole numbers; mend the file")
    return spent


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
