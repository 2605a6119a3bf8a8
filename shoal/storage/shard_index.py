"""The JSON index of tensors in several files. It may come from an untrusted source, so everything in it is checked."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.storage.files import read_json

FORMAT = "shoal shards 1"
_LARGEST = 100_000_000
"""Largest size in bytes of an index that is read."""
_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class Shard:
    """One file of a set: its name, size in bytes and SHA-256 in hex."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, stem: str, blob: bytes) -> Shard:
        """The entry for a file with the bytes `blob`, in the set `stem`."""
        digest = hashlib.sha256(blob).hexdigest()
        return cls(f"{stem}.shard-{digest[:16]}.safetensors", len(blob), digest)


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` (exclusive) of a flattened tensor, and the position of their file in `Index.files`."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class Entry:
    """A tensor's type and shape, and its pieces in order. A single piece keeps the shape, others are flat."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Index:
    """The files of a set, its tensors by name, and its metadata."""

    files: tuple[Shard, ...]
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def text(self) -> str:
        """The index as JSON, with a checksum of the rest of it."""
        tensors = {
            name: {"dtype": e.dtype, "shape": e.shape, "pieces": [[p.file, p.start, p.stop] for p in e.pieces]}
            for name, e in self.tensors.items()
        }
        body = {"format": FORMAT, "files": [asdict(f) for f in self.files], "tensors": tensors}
        body["metadata"] = dict(self.metadata)
        return json.dumps(body | {"sha256": _digest(body)}, separators=(",", ":"))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_index(path: Path) -> Index:
    """The index at `path`. Raises ShoalError when it is missing, damaged, too large or inconsistent."""
    try:
        if path.is_file() and path.stat().st_size > _LARGEST:
            raise ValueError(f"{path.stat().st_size} bytes")
        return _parse(read_json(path), path.name.removesuffix(".index.json"))
    except (KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        raise ShoalError(
            f"found a damaged index of weights at {path} ({error}); need the file that shoal wrote; copy it again or "
            "repeat the run"
        ) from error


def names_in(path: Path) -> frozenset[str] | None:
    """Names of the files in the index at `path`; empty if there is no index, None if it cannot be read."""
    try:
        return frozenset(shard.name for shard in read_index(path).files) if path.exists() else frozenset()
    except ShoalError:
        return None


def _parse(body: Any, stem: str) -> Index:
    _need(isinstance(body, dict) and body.get("format") == FORMAT, f"not in format {FORMAT!r}")
    _need(body.pop("sha256", None) == _digest(body), "its checksum does not match")
    _need(set(body) == {"format", "files", "tensors", "metadata"}, "missing or unknown keys")
    files = tuple(_shard(one, stem) for one in _list(body["files"]))
    _need(len({f.name for f in files}) == len(files), "a file twice")
    tensors = {name: _entry(one, name, len(files)) for name, one in _dict(body["tensors"]).items()}
    metadata = {k: v for k, v in _dict(body["metadata"]).items() if isinstance(v, str)}
    _need(len(metadata) == len(body["metadata"]), "metadata other than text")
    return Index(files, tensors, metadata)


def _shard(one: Any, stem: str) -> Shard:
    """A checked entry. The name must follow from the set's name and the digest, so no path can leave the folder."""
    shard = Shard(**_dict(one))
    _need(isinstance(shard.sha256, str) and re.fullmatch("[0-9a-f]{64}", shard.sha256) is not None, "no SHA-256")
    _need(type(shard.size) is int and shard.size > 0, f"a file of {shard.size!r:.30} bytes")
    named = f"{stem}.shard-{shard.sha256[:16]}.safetensors"
    _need(shard.name == named, f"a file named {shard.name!r:.80} and not {named!r}")
    return shard


def _entry(one: Any, name: str, files: int) -> Entry:
    _need(set(_dict(one)) == {"dtype", "shape", "pieces"} and isinstance(one["dtype"], str), f"tensor {name!r:.60}")
    shape = tuple(_count(size) for size in _list(one["shape"]))
    pieces = tuple(Piece(*(_count(number) for number in _list(piece))) for piece in _list(one["pieces"]))
    whole = len(shape) <= _MOST_DIMENSIONS and _covered(pieces, math.prod(shape))
    _need(whole and all(p.file < files for p in pieces), f"pieces that do not cover tensor {name!r:.60} exactly once")
    return Entry(one["dtype"], shape, pieces)


def _covered(pieces: tuple[Piece, ...], count: int) -> bool:
    """Whether the pieces, each in its own file, cover `count` elements without a gap or an overlap."""
    if len(pieces) == 1:
        return (pieces[0].start, pieces[0].stop) == (0, count)
    inner = all(a.stop == b.start and a.file < b.file for a, b in pairwise(pieces))
    ends = bool(pieces) and (pieces[0].start, pieces[-1].stop) == (0, count)
    return inner and ends and all(p.start < p.stop for p in pieces)


def _need(sound: bool, found: str) -> None:
    if not sound:
        raise ValueError(found)


def _list(value: Any) -> list[Any]:
    _need(isinstance(value, list), "not a list")
    return list(value)


def _dict(value: Any) -> dict[str, Any]:
    _need(isinstance(value, dict), "not an object")
    return dict(value)


def _count(value: Any) -> int:
    _need(type(value) is int and value >= 0, f"{value!r:.30} as a count")
    return int(value)
