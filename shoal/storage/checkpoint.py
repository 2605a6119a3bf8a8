"""Checkpoints in safetensors. They are written atomically: a kill at any moment leaves the last complete one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.storage.tensors import has_tensors, load_state, read_tensors, read_with_metadata, write_tensors


class Checkpoint:
    """The two files of a training stage in `folder`: `<stage>.best` for use, `<stage>.last` for resuming.

    With `shard_bytes`, each is a set of files of at most that many bytes. Files that were written with another limit,
    or none, can still be read.
    """

    def __init__(self, folder: Path | str, stage: str = "model", shard_bytes: int | None = None) -> None:
        self.folder, self.stage, self.shard_bytes = Path(folder), stage, shard_bytes

    @property
    def best_path(self) -> Path:
        """File of the best epoch's weights."""
        return self.folder / f"{self.stage}.best.safetensors"

    @property
    def last_path(self) -> Path:
        """File of the weights, the optimiser state and the progress at the last checkpoint."""
        return self.folder / f"{self.stage}.last.safetensors"

    @property
    def has_best(self) -> bool:
        """True once `save_best` has written."""
        return has_tensors(self.best_path)

    @property
    def has_last(self) -> bool:
        """True once `save_last` has written."""
        return has_tensors(self.last_path)

    def save_best(self, state: dict[str, Tensor]) -> None:
        """Write a state dict as the best one. Raises ShoalError when it cannot be written."""
        write_tensors(self.best_path, state, shard_bytes=self.shard_bytes)

    def load_best(self) -> dict[str, Tensor]:
        """The state dict of the best epoch. Raises ShoalError when the file is missing or damaged."""
        return read_tensors(self.best_path)

    def save_last(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        hooks: Sequence[Any],
        progress: dict[str, Any],
    ) -> None:
        """Write everything that the next epoch depends on; the rest follows from seed and epoch.

        `progress` is JSON data: the last finished `epoch`, metric `rows`, `best` accuracy and `best_epoch`; within an
        epoch also `step`, and the sums over its steps. Raises ShoalError when it cannot be written.
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
        """Copy both files of `other`, unless this stage already has a checkpoint to resume from."""
        if self.has_last:
            return
        for own, theirs in ((self.best_path, other.best_path), (self.last_path, other.last_path)):
            if has_tensors(theirs):
                write_tensors(own, *read_with_metadata(theirs), self.shard_bytes)

    def read_last(self) -> Last:
        """What `save_last` wrote. Raises ShoalError when the file is missing or damaged."""
        tensors, metadata = read_with_metadata(self.last_path)
        try:
            body: dict[str, Any] = json.loads(metadata["progress"])
        except (KeyError, TypeError, ValueError) as error:
            raise ShoalError(f"found no progress in {self.last_path}; need a checkpoint that fit wrote") from error
        return Last(self.last_path, tensors, body)


@dataclass(frozen=True)
class Last:
    """A checkpoint in memory: its tensors, and its progress as JSON data."""

    path: Path
    tensors: dict[str, Tensor]
    progress: dict[str, Any]

    def restore(self, model: nn.Module, optimiser: torch.optim.Optimizer, hooks: Sequence[Any] = ()) -> None:
        """Load the state into `model`, `optimiser` and `hooks`, in place.

        Raises ShoalError when it is of another model.
        """
        load_state(model, _below(self.tensors, "model."), self.path)
        self._load_momentum(optimiser)
        for i, hook in enumerate(hooks):
            if hasattr(hook, "load"):
                hook.load(_below(self.tensors, f"hook{i}."))

    def _load_momentum(self, optimiser: torch.optim.Optimizer) -> None:
        plain, parameters = optimiser.state_dict(), [p for g in optimiser.param_groups for p in g["params"]]
        # A fused update needs each buffer in its parameter's memory format, but files do not store channels_last.
        for i, value in _below(self.tensors, "momentum.").items():
            laid = torch.empty_like(parameters[int(i)], requires_grad=False)
            plain["state"][int(i)] = {"momentum_buffer": laid.copy_(value)}
        optimiser.load_state_dict(plain)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
