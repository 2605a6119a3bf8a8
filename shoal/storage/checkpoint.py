"""Checkpoints in safetensors, written atomically: a kill at any moment leaves the last good one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.graph import load_weights
from shoal.shard_index import Shard, names_in, read_index
from shoal.shards import check_limit, index_path, indexed, is_shard, pack, read, strays

CHECKSUM = "sha256"
"""Where a safetensors file's metadata hold the checksum of the rest."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch path beside `path` to write to; it becomes `path` at the end of the block, or vanishes on an error.

    Raises ShoalError when the file cannot be written; `path` is then what it was before.
    """
    scratch = path.parent / f".{path.name}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        _settle(scratch)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            scratch.unlink()


def _settle(path: Path) -> None:
    """Have the file's bytes on the disk before its name points to them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file so that `path` holds either the old or the whole new content."""
    with replacing(path) as scratch:
        scratch.write_text(text)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; a failure leaves the file as it was, and a line cut off by a kill stays alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            cut_off = file.read(1) not in (b"", b"\n")
            _append(file, size, ("\n" * cut_off + line + "\n").encode())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _append(file: BinaryIO, size: int, data: bytes) -> None:
    written = 0
    try:
        while written < len(data):
            written += os.write(file.fileno(), data[written:])
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, shard_bytes: int | None = None
) -> None:
    """Write a safetensors file, with its checksum, so that `path` holds either the old or the whole new content.

    With `shard_bytes` it is a set of files of at most that many bytes each (`shards`) in place of the one file, and
    what of the other kind was there is removed. Raises ShoalError when they cannot be written, or not so small.
    """
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    facts = metadata or {}
    if shard_bytes is not None:
        check_limit(shard_bytes)
        _write_shards(path, plain, facts, shard_bytes)
        return _remove(path)
    with replacing(path) as scratch:
        save_file(plain, scratch, facts | {CHECKSUM: checksum(plain, facts)})
    _remove(index_path(path))  # it would be read instead
    _sweep(path, frozenset())


def _write_shards(path: Path, tensors: dict[str, Tensor], facts: dict[str, str], limit: int) -> None:
    """Files, then the index that names them, then away with those of the set before, or of this one if it fails."""
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
    """One file of the set of `path`, and how many elements of each tensor are in it."""
    blob = save(part, {"part": str(number)})  # or equal pieces of one tensor would be one file
    assert len(blob) <= limit
    shard = Shard.of(path.stem, blob)
    with replacing(path.with_name(shard.name)) as scratch:
        scratch.write_bytes(blob)
    return shard, {name: tensor.numel() for name, tensor in part.items()}


def _sweep(path: Path, kept: frozenset[str] | None) -> None:
    """Remove shards that no index names; they take room and do no harm, so one that stays is no error."""
    with suppress(OSError):
        for file in strays(path, kept) if kept is not None else ():
            file.unlink()


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def has_tensors(path: Path) -> bool:
    """True when `read_tensors` finds something at `path`: one file, or a set of them."""
    return path.exists() or index_path(path).exists()


def fit_files(folder: Path, limit: int) -> None:
    """Write again, as files of at most `limit` bytes, what of the tensors right in `folder` has larger ones.

    Raises ShoalError for what cannot be read or written.
    """
    for path in sorted(folder.glob("*.safetensors")):
        if not is_shard(path) and path.stat().st_size > limit:
            write_tensors(path, *_read(path), limit)
    for index in sorted(folder.glob("*.index.json")):
        path = index.with_name(index.name.removesuffix(".index.json") + ".safetensors")
        if max(index.stat().st_size, *(shard.size for shard in read_index(index).files), 0) > limit:
            write_tensors(path, *_read(path), limit)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors that `write_tensors` wrote, as one file or several.

    Raises ShoalError when they are missing, truncated or altered.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata; a safetensors file without a checksum (made elsewhere) is taken as it is.

    Where there are both a file and an index, as a kill leaves them, both are whole, and the index is taken.
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


def _cannot_write(path: Path, error: Exception) -> ShoalError:
    return ShoalError(
        f"found that {path} cannot be written ({error}); need free space and a writable folder; what was there "
        "before is kept, so make room or choose another place, and go on"
    )


class Checkpoint:
    """The two files of a training stage in `folder`: `<stage>.best` for use, `<stage>.last` for going on.

    With `shard_bytes`, each is a set of files of at most that many bytes. What another limit or none has written is
    read all the same.
    """

    def __init__(self, folder: Path | str, stage: str = "model", shard_bytes: int | None = None) -> None:
        self.folder, self.stage, self.shard_bytes = Path(folder), stage, shard_bytes

    @property
    def best_path(self) -> Path:
        """Weights of the best epoch."""
        return self.folder / f"{self.stage}.best.safetensors"

    @property
    def last_path(self) -> Path:
        """Weights, optimiser state and progress at the last checkpoint."""
        return self.folder / f"{self.stage}.last.safetensors"

    @property
    def has_best(self) -> bool:
        """True once an epoch has been judged."""
        return has_tensors(self.best_path)

    @property
    def has_last(self) -> bool:
        """True once `save_last` has written."""
        return has_tensors(self.last_path)

    def save_best(self, state: dict[str, Tensor]) -> None:
        """Keep a state dict as the best one."""
        write_tensors(self.best_path, state, shard_bytes=self.shard_bytes)

    def load_best(self) -> dict[str, Tensor]:
        """The state dict of the best epoch. Raises ShoalError on a damaged file."""
        return read_tensors(self.best_path)

    def save_last(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        hooks: Sequence[Any],
        progress: dict[str, Any],
    ) -> None:
        """Everything that the next epoch depends on, in one file or set: what is not in it follows from seed and epoch.

        `progress` is JSON data: `epoch` done, metric `rows`, `best` accuracy and `best_epoch`; within an epoch also the
        `step` and what its steps have come to.
        """
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        for i, state in optimiser.state_dict()["state"].items():
            if state.get("momentum_buffer") is not None:
                tensors[f"momentum.{i}"] = state["momentum_buffer"]
        for i, hook in enumerate(hooks):
            if hasattr(hook, "state"):
                tensors |= {f"hook{i}.{k}": v for k, v in hook.state().items()}
        write_tensors(self.last_path, tensors, {"progress": json.dumps(progress)}, self.shard_bytes)

    def take(self, other: Checkpoint) -> None:
        """Have what `other` has, as this one's; a stage that has begun here stays as it is."""
        if self.has_last:
            return
        for own, theirs in ((self.best_path, other.best_path), (self.last_path, other.last_path)):
            if has_tensors(theirs):
                write_tensors(own, *_read(theirs), self.shard_bytes)

    def read_last(self) -> Last:
        """What `save_last` wrote. Raises ShoalError on a damaged file."""
        tensors, metadata = _read(self.last_path)
        try:
            body: dict[str, Any] = json.loads(metadata["progress"])
        except (KeyError, TypeError, ValueError) as error:
            raise ShoalError(f"found no progress in {self.last_path}; need a checkpoint that fit wrote") from error
        return Last(self.last_path, tensors, body)


@dataclass(frozen=True)
class Last:
    """A checkpoint that has been read: its tensors, and the progress as JSON data."""

    path: Path
    tensors: dict[str, Tensor]
    progress: dict[str, Any]

    def restore(self, model: nn.Module, optimiser: torch.optim.Optimizer, hooks: Sequence[Any] = ()) -> None:
        """Restore `model`, `optimiser` and `hooks` in place. Raises ShoalError when it is of another model."""
        load_state(model, _below(self.tensors, "model."), self.path)
        self._load_momentum(optimiser)
        for i, hook in enumerate(hooks):
            if hasattr(hook, "load"):
                hook.load(_below(self.tensors, f"hook{i}."))

    def _load_momentum(self, optimiser: torch.optim.Optimizer) -> None:
        plain, parameters = optimiser.state_dict(), [p for g in optimiser.param_groups for p in g["params"]]
        # A fused update goes through memory, so a buffer lies there as its parameter does: files know no channels_last.
        for i, value in _below(self.tensors, "momentum.").items():
            laid = torch.empty_like(parameters[int(i)], requires_grad=False)
            plain["state"][int(i)] = {"momentum_buffer": laid.copy_(value)}
        optimiser.load_state_dict(plain)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load_state(model: nn.Module, state: dict[str, Tensor], where: Path | str) -> None:
    """Load a state dict; ShoalError naming the first difference when it belongs to another model."""
    own = model.state_dict()
    odd = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
    if odd:
        raise ShoalError(
            f"found weights of another model at {where} (first difference: {odd[0]}); need a checkpoint made with "
            "this spec; check width, classes and input size"
        )
    model.load_state_dict(state)
