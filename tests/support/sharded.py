"""Tensors that lie in several files, and how two sets are compared."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shoal.storage.shards import SMALLEST_LIMIT

LIMIT = SMALLEST_LIMIT
FACTS = {"progress": '{"epoch": 1, "ü": "\\n"}'}
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
TYPES += [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


def some(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of all kinds; one is cut into equal pieces, one into different ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {str(t): torch.randint(0, 2, (3, 5), generator=generator).to(t) for t in TYPES}
    tensors |= {"zeros": torch.zeros(90_000), "large": torch.randn(70, 900, generator=generator)}
    tensors |= {"flags": torch.randint(0, 2, (200_001,), generator=generator).bool(), "none": torch.empty(0, 4)}
    return tensors | {"one": torch.tensor(7 + seed), "sixteen": torch.randn(40_000, generator=generator).bfloat16()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, types, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(_bits(a[k]), _bits(b[k])) for k in a
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.shard-*.safetensors"))
