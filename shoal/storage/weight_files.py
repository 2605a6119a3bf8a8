"""Weights that were trained elsewhere: PyTorch and safetensors files, in the layouts in which people save them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.errors import ShoalError, first_line
from shoal.storage.tensors import load_weights

NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "ema", "ema_state_dict")
"""Keys under which a checkpoint may hold its weights, the more usual first."""
CLAIMS = (
    "best_prec1",
    "best_acc1",
    "best_acc",
    "best_accuracy",
    "test_acc",
    "test_accuracy",
    "acc1",
    "acc",
    "accuracy",
)
"""Keys under which a checkpoint may hold its accuracy."""
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""Prefixes that wrappers such as DataParallel and torch.compile add to every name."""


@dataclass(frozen=True)
class Weights:
    """Tensors by name, the accuracy that the file itself states (in percent, or None), and the file."""

    tensors: dict[str, Tensor]
    claimed: float | None
    path: Path


def read_weights(path: Path) -> Weights:
    """Read a .safetensors file, or one of `torch.save` (.pt, .pth, .th, .pth.tar, .bin, .ckpt).

    No Python object other than tensors and plain containers is loaded from the file (``weights_only=True``). Weights
    may be nested under one of `NESTED`. Raises ShoalError when the file is missing or damaged, when it holds other
    objects, and when it holds no weights.
    """
    if path.suffix == ".safetensors":
        return Weights(load_weights(path), None, path)
    body = _load(path)
    return Weights(_tensors(body, path), _claim(body), path)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ShoalError(
            f"found Python objects at {path} that are not tensors ({_culprit(error)}), and loading them could run "
            "code; need a file of weights alone; where you trust it, save it again with "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # torch raises many types for files that are missing, damaged or of another kind
        raise ShoalError(
            f"found no readable weights at {path} ({first_line(error)}); need a file of torch.save, or .safetensors; "
            "check the path"
        ) from error


def _culprit(error: Exception) -> str:
    """What PyTorch refused to load, such as ``__main__.Net``, from its message."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    return named[1] if named else "a whole module"


def _tensors(body: Any, path: Path) -> dict[str, Tensor]:
    found = body
    for _ in range(3):  # such as {"state_dict": {"model": ...}}
        inner = next((found[k] for k in NESTED if k in found), None) if isinstance(found, Mapping) else None
        if not isinstance(inner, Mapping):
            break
        found = inner
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        keys = ", ".join(map(str, list(found)[:5])) if isinstance(found, Mapping) else ""
        what = f"the keys {keys}" if keys else f"a {type(found).__name__}"
        raise ShoalError(
            f"found {what} at {path}, but no weights; need tensors by name, alone or under one of "
            f"{', '.join(NESTED)}; save model.state_dict()"
        )
    return {str(name): tensor.detach() for name, tensor in found.items()}


def _claim(body: Any) -> float | None:
    """The accuracy that a checkpoint states, in percent."""
    if not isinstance(body, Mapping):
        return None
    for key in CLAIMS:
        value = body.get(key)
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, (int, float)) and 0 < value <= 100:
            return 100.0 * value if value <= 1 else float(value)
    return None
