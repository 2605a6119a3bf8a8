"""Text and JSON files: atomic writes, and reads that raise one clear error."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from shoal.errors import ShoalError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch path to write to. At the end of the block it replaces `path`; on an error it is deleted.

    Raises ShoalError when the file cannot be written; `path` then keeps its old content.
    """
    scratch = path.parent / f".{path.name}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        _settle(scratch)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            scratch.unlink()


def _settle(path: Path) -> None:
    """Write the file's bytes to the disk, before its name points to them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: `path` holds either the old or the whole new content.

    Raises ShoalError when it cannot be written.
    """
    with replacing(path) as scratch:
        scratch.write_text(text)


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file; an error leaves the file unchanged.

    A line that a kill cut off keeps a line of its own. Raises ShoalError when the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            cut_off = file.read(1) not in (b"", b"\n")
            _append(file, size, ("\n" * cut_off + line + "\n").encode())
    except OSError as error:
        raise cannot_write(path, error) from error


def _append(file: BinaryIO, size: int, data: bytes) -> None:
    written = 0
    try:
        while written < len(data):
            written += os.write(file.fileno(), data[written:])
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def cannot_write(path: Path, error: Exception) -> ShoalError:
    """The error for a file that cannot be written."""
    return ShoalError(
        f"found that {path} cannot be written ({error}); need free space and a writable folder; what was there "
        "before is kept, so make room or choose another place, and go on"
    )


def read_json(path: Path) -> Any:
    """The JSON content of a file. Raises ShoalError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ShoalError(f"found no readable JSON at {path} ({error}); need an intact file; make it again") from error
