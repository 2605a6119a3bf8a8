"""Checkpoints in safetensors, written atomically: a kill at any moment leaves the last good one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.graph import load_weights


def write_text(path: Path, text: str) -> None:
    """Write a text file so that `path` holds either the old or the whole new content."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that `path` holds either the old or the whole new content."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, scratch, metadata)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        scratch.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: Exception) -> ShoalError:
    return ShoalError(
        f"found that {path} cannot be written ({error}); need free space and a writable folder; what was there "
        "before is kept, so free some space and resume"
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
        return load_weights(self.best_path)

    def save_last(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        hooks: Sequence[Any],
        progress: dict[str, Any],
    ) -> None:
        """Everything that the next epoch depends on, in one file: what is not in it follows from seed and epoch.

        `progress` is JSON data: `epoch` done, metric `rows`, `best` accuracy and `best_epoch`.
        """
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        for i, state in optimiser.state_dict()["state"].items():
            if state.get("momentum_buffer") is not None:
                tensors[f"momentum.{i}"] = state["momentum_buffer"]
        for i, hook in enumerate(hooks):
            if hasattr(hook, "state"):
                tensors |= {f"hook{i}.{k}": v for k, v in hook.state().items()}
        write_tensors(self.last_path, tensors, {"progress": json.dumps(progress)})

    def load_last(
        self, model: nn.Module, optimiser: torch.optim.Optimizer, hooks: Sequence[Any] = ()
    ) -> dict[str, Any]:
        """Restore `model`, `optimiser` and `hooks` in place; returns the progress.

        Raises ShoalError on a damaged file or one of another model.
        """
        tensors = load_weights(self.last_path)
        try:
            with safe_open(self.last_path, "pt") as file:
                body: dict[str, Any] = json.loads(file.metadata()["progress"])
        except (KeyError, TypeError, ValueError) as error:
            raise ShoalError(f"found no progress in {self.last_path}; need a checkpoint that fit wrote") from error
        load_state(model, _below(tensors, "model."), self.last_path)
        self._load_momentum(optimiser, _below(tensors, "momentum."))
        for i, hook in enumerate(hooks):
            if hasattr(hook, "load"):
                hook.load(_below(tensors, f"hook{i}."))
        return body

    def _load_momentum(self, optimiser: torch.optim.Optimizer, buffers: dict[str, Tensor]) -> None:
        plain = optimiser.state_dict()
        plain["state"] = {int(i): {"momentum_buffer": buffer} for i, buffer in buffers.items()}
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
