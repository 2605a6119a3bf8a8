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
from safetensors.torch import save_file
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.graph import load_weights

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


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with its checksum, so that `path` holds either the old or the whole new content."""
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    facts = metadata or {}
    with replacing(path) as scratch:
        save_file(plain, scratch, facts | {CHECKSUM: _checksum(plain, facts)})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that `write_tensors` wrote. Raises ShoalError when it is missing, truncated or altered."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; one without a checksum (made elsewhere) is taken as it is."""
    tensors = load_weights(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
    stated = metadata.pop(CHECKSUM, None)
    if stated is not None and stated != _checksum(tensors, metadata):
        raise ShoalError(
            f"found tensors unlike what was saved at {path}; need the file unaltered; copy it again or repeat the run"
        )
    return tensors, metadata


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 in hex over the metadata and every tensor's name, type, shape and bytes."""
    hasher = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _cannot_write(path: Path, error: Exception) -> ShoalError:
    return ShoalError(
        f"found that {path} cannot be written ({error}); need free space and a writable folder; what was there "
        "before is kept, so make room or choose another place, and go on"
    )


class Checkpoint:
    """The two files of a training stage in `folder`: `<stage>.best` for use, `<stage>.last` for going on."""

    def __init__(self, folder: Path | str, stage: str = "model") -> None:
        self.folder, self.stage = Path(folder), stage

    @property
    def best_path(self) -> Path:
        """Weights of the best epoch."""
        return self.folder / f"{self.stage}.best.safetensors"

    @property
    def last_path(self) -> Path:
        """Weights, optimiser state and progress after the last epoch."""
        return self.folder / f"{self.stage}.last.safetensors"

    @property
    def has_best(self) -> bool:
        """True once an epoch has been judged."""
        return self.best_path.exists()

    @property
    def has_last(self) -> bool:
        """True once an epoch has ended."""
        return self.last_path.exists()

    def save_best(self, state: dict[str, Tensor]) -> None:
        """Keep a state dict as the best one."""
        write_tensors(self.best_path, state)

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
        """Everything that the next epoch depends on, in one file: what is not in it follows from seed and epoch.

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
        write_tensors(self.last_path, tensors, {"progress": json.dumps(progress)})

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
        buffers = {int(i): value for i, value in _below(self.tensors, "momentum.").items()}
        laid = {i: torch.empty_like(parameters[i]).copy_(value) for i, value in buffers.items()}
        plain["state"] = {i: {"momentum_buffer": value.detach()} for i, value in laid.items()}
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
