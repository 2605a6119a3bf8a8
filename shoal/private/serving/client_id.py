"""The name under which a server keeps a client's pool, so that several pools of one certificate do not mix."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

from shoal.errors import ShoalError

FILE = "client-id"


def own_name(root: Path) -> str:
    """The name of the pool at `root`, 16 hex digits; the first process that asks makes it.

    Raises ShoalError for a damaged file, and when it cannot be written.
    """
    path = root / FILE
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
