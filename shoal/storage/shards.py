"""Tensors in several safetensors files of limited size, with an index file that says where each tensor is.

The files of `model.safetensors` are `model.shard-<digest>.safetensors`, and `model.index.json` names them. File names
depend on the contents, so a new set never overwrites a file that the old index names; replacing the index replaces the
whole set. `tensors` writes them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from shoal.errors import ShoalError
from shoal.storage.shard_index import Entry, Index, Piece, Shard, read_index

SMALLEST_LIMIT = 64_000
"""Smallest limit in bytes. With a smaller one, files would be mostly headers and index."""

# Upper bounds in bytes: a header with only the file's number, a tensor's entry without its name, a dimension in it.
_HEADER, _ENTRY, _DIMENSION = 96, 128, 21


def index_path(path: Path) -> Path:
    """Path of the index of the set that replaces the file at `path`."""
    return path.with_suffix(".index.json")


def is_shard(path: Path) -> bool:
    """Whether the name of `path` is that of a file in a set."""
    return re.search(r"\.shard-[0-9a-f]{16}\.safetensors$", path.name) is not None


def check_limit(limit: float) -> None:
    """Raise ShoalError unless `limit`, in bytes, is finite and at least SMALLEST_LIMIT."""
    if not (math.isfinite(limit) and limit >= SMALLEST_LIMIT):
        raise ShoalError(
            f"found a limit of {limit / 1e6:g} MB for a file of weights; need {SMALLEST_LIMIT / 1e6:g} or more; "
            "choose a larger --shard-mb, or leave it out for one file"
        )


# ---- writing


def pack(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file of at most `limit` bytes, in order: whole tensors, and flat pieces of larger ones.

    No file holds two pieces of one tensor, so each piece is stored under the tensor's name. Raises ShoalError when
    `limit` leaves no room beside a header.
    """
    part: dict[str, Tensor] = {}
    used = _HEADER
    for name, tensor in tensors.items():
        head = len(json.dumps(name)) + _ENTRY + _DIMENSION * tensor.ndim
        for piece in _cut(name, tensor, limit - _HEADER - head):
            size = head + piece.numel() * piece.element_size()
            if part and used + size > limit:
                yield part
                part, used = {}, _HEADER
            part[name], used = piece, used + size
    if part:
        yield part


def _cut(name: str, tensor: Tensor, room: int) -> tuple[Tensor, ...]:
    """The tensor, or flat pieces of it with at most `room` bytes each."""
    each = tensor.element_size()
    if tensor.numel() * each <= room:
        return (tensor,)
    if room < each:
        raise ShoalError(f"found no room for tensor {name[:60]!r} and its name in a file; need a higher limit")
    return tensor.reshape(-1).split(room // each)


def indexed(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], written: Sequence[tuple[Shard, Mapping[str, int]]]
) -> Index:
    """The index of a set. `written` has each file, with the number of elements of each tensor in it."""
    pieces: dict[str, list[Piece]] = {name: [] for name in tensors}
    for number, (_, counts) in enumerate(written):
        for name, count in counts.items():
            start = pieces[name][-1].stop if pieces[name] else 0
            pieces[name].append(Piece(number, start, start + count))
    entries = {name: Entry(_type(t), tuple(t.shape), tuple(pieces[name])) for name, t in tensors.items()}
    return Index(tuple(shard for shard, _ in written), entries, metadata)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def strays(path: Path, kept: Collection[str]) -> list[Path]:
    """Files beside `path` that are left from a kill or an earlier set: shards not in `kept`, and scratch files.

    Call it only while none of them is being written.
    """
    stem = re.escape(path.stem)
    shard = rf"{stem}\.shard-[0-9a-f]{{16}}\.safetensors"
    left = re.compile(rf"{shard}|\.({shard}|{re.escape(path.name)}|{stem}\.index\.json)\.tmp")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return [file for file in beside if left.fullmatch(file.name) and file.name not in kept]


# ---- reading


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of the set with the index at `path`.

    Raises ShoalError, naming the file, when the index is damaged or wrong, or a file is missing, altered or of another
    set.
    """
    index = read_index(path)
    for shard in index.files:  # all sizes first, so that no more bytes are read than the index states
        _check_size(path.parent / shard.name, shard, path)
    wanted: list[dict[str, Piece]] = [{} for _ in index.files]
    for name, entry in index.tensors.items():
        for piece in entry.pieces:
            wanted[piece.file][name] = piece
    pieces: dict[str, list[Tensor]] = {name: [] for name in index.tensors}
    for shard, own in zip(index.files, wanted, strict=True):
        for name, tensor in _gathered(index, shard, own, path).items():
            pieces[name].append(tensor)
    return {name: _joined(entry, pieces[name]) for name, entry in index.tensors.items()}, dict(index.metadata)


def _check_size(file: Path, shard: Shard, index: Path) -> None:
    try:
        found = file.stat().st_size if file.is_file() else None
    except OSError:
        found = None
    if found != shard.size:
        what = "no file" if found is None else f"{found} bytes"
        raise ShoalError(
            f"found {what} at {file}; need the {shard.size} bytes that {index.name} names; copy all files of the set "
            "again or repeat the run"
        )


def _gathered(index: Index, shard: Shard, wanted: Mapping[str, Piece], path: Path) -> dict[str, Tensor]:
    """The tensors in one file. Raises ShoalError when they differ from the index."""
    file = path.parent / shard.name
    found = _load(file, shard)
    odd = sorted(set(found) ^ set(wanted)) or [n for n, t in found.items() if not _fits(t, index.tensors[n], wanted[n])]
    if odd:
        raise ShoalError(
            f"found tensor {odd[0][:60]!r} in only one of {file} and {path.name}, or different in both; need files of "
            "one set; copy them again or repeat the run"
        )
    return found


def _load(file: Path, shard: Shard) -> dict[str, Tensor]:
    try:
        blob = file.read_bytes()
        if hashlib.sha256(blob).hexdigest() != shard.sha256:
            raise ShoalError(
                f"found tensors unlike what was saved at {file}; need the file unaltered; copy it again or repeat the "
                "run"
            )
        return dict(load(blob))
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ShoalError(
            f"found an unreadable weight file at {file} ({error}); need an intact safetensors file; make it again"
        ) from error


def _fits(tensor: Tensor, entry: Entry, piece: Piece) -> bool:
    shape = entry.shape if len(entry.pieces) == 1 else (piece.stop - piece.start,)
    return _type(tensor) == entry.dtype and tuple(tensor.shape) == shape


def _joined(entry: Entry, pieces: list[Tensor]) -> Tensor:
    """Join pieces as bytes, because torch cannot concatenate every type."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([piece.view(torch.uint8) for piece in pieces]).view(pieces[0].dtype).reshape(entry.shape)
