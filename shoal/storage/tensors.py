"""Tensors on disk: safetensors with checksums, in one file or in several files of limited size."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.storage.arrays import unreadable
from shoal.storage.files import cannot_write, replacing, write_text
from shoal.storage.shard_index import Shard, names_in, read_index
from shoal.storage.shards import check_limit, index_path, indexed, is_shard, pack, read, strays

CHECKSUM = "sha256"
"""Metadata key of a safetensors file with the checksum of the rest."""


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, shard_bytes: int | None = None
) -> None:
    """Write a safetensors file with a checksum, atomically: `path` holds either the old or the whole new content.

    With `shard_bytes`, write a set of files of at most that many bytes each instead (see `shards`). A file or set of
    the other kind is removed. Raises ShoalError when the tensors cannot be written, or the limit is too small.
    """
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    facts = metadata or {}
    if shard_bytes is not None:
        check_limit(shard_bytes)
        _write_shards(path, plain, facts, shard_bytes)
        return _remove(path)
    with replacing(path) as scratch:
        save_file(plain, scratch, facts | {CHECKSUM: checksum(plain, facts)})
    _remove(index_path(path))  # an index would be read instead of the file
    _sweep(path, frozenset())


def _write_shards(path: Path, tensors: dict[str, Tensor], facts: dict[str, str], limit: int) -> None:
    """Write the files, then the index that names them. Then delete the old files, or on an error the new ones."""
    index = index_path(path)
    kept = names_in(index)
    try:
        written = [_write_shard(path, i, part, limit) for i, part in enumerate(pack(tensors, limit))]
        made = indexed(tensors, facts, written)
        text = made.text()
        if len(text) > limit:
            raise ShoalError(
                f"found an index of {len(text)} bytes for {path}; need {limit} at most; choose a higher limit"
            )
        write_text(index, text)
        kept = frozenset(shard.name for shard in made.files)
    finally:
        _sweep(path, kept)


def _write_shard(path: Path, number: int, part: dict[str, Tensor], limit: int) -> tuple[Shard, dict[str, int]]:
    """Write one file of the set of `path`; its entry, and the number of elements of each tensor in it."""
    blob = save(part, {"part": str(number)})  # without the number, equal pieces of one tensor would be one file
    assert len(blob) <= limit
    shard = Shard.of(path.stem, blob)
    with replacing(path.with_name(shard.name)) as scratch:
        scratch.write_bytes(blob)
    return shard, {name: tensor.numel() for name, tensor in part.items()}


def _sweep(path: Path, kept: frozenset[str] | None) -> None:
    """Delete left-over files that are not in `kept`. An error is ignored, because such files only take space."""
    with suppress(OSError):
        for file in strays(path, kept) if kept is not None else ():
            file.unlink()


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def has_tensors(path: Path) -> bool:
    """True when there are tensors at `path`: one file, or a set."""
    return path.exists() or index_path(path).exists()


def fit_files(folder: Path, limit: int) -> None:
    """Rewrite the tensors directly in `folder` that have a file of more than `limit` bytes, as smaller files.

    Raises ShoalError when they cannot be read or written.
    """
    for path in sorted(folder.glob("*.safetensors")):
        if not is_shard(path) and path.stat().st_size > limit:
            write_tensors(path, *read_with_metadata(path), limit)
    for index in sorted(folder.glob("*.index.json")):
        path = index.with_name(index.name.removesuffix(".index.json") + ".safetensors")
        if max(index.stat().st_size, *(shard.size for shard in read_index(index).files), 0) > limit:
            write_tensors(path, *read_with_metadata(path), limit)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that `write_tensors` wrote, in one file or several.

    Raises ShoalError when they are missing, truncated or altered.
    """
    return read_with_metadata(path)[0]


def read_with_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and their metadata. A safetensors file without a checksum, made elsewhere, is accepted.

    If a kill has left both a file and an index, both are complete, and the index is used. Raises ShoalError when the
    tensors are missing, truncated or altered.
    """
    if index_path(path).exists():
        return read(index_path(path))
    tensors = load_weights(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
    stated = metadata.pop(CHECKSUM, None)
    if stated is not None and stated != checksum(tensors, metadata):
        raise ShoalError(
            f"found tensors unlike what was saved at {path}; need the file unaltered; copy it again or repeat the run"
        )
    return tensors, metadata


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 in hex over the metadata and every tensor's name, type, shape and bytes."""
    hasher = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def load_state(model: nn.Module, state: dict[str, Tensor], where: Path | str) -> None:
    """Load a state dict into `model`.

    Raises ShoalError, naming the first difference, when it is of another model.
    """
    own = model.state_dict()
    odd = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
    if odd:
        raise ShoalError(
            f"found weights of another model at {where} (first difference: {odd[0]}); need a checkpoint made with "
            "this spec; check width, classes and input size"
        )
    model.load_state_dict(state)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ShoalError when it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(path, error) from error
