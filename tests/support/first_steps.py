"""For each operation of a program a network that applies it to the image itself, and one with all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (2, 6, 6)


@dataclass(frozen=True)
class Row:
    """An operation on the image [N, *IMAGE]. Its result is averaged if it has height and width."""

    apply: Callable[[Tensor], Tensor]
    layer: Callable[[], nn.Module] | None = None


ROWS: dict[str, Row] = {
    "conv2d": Row(lambda x: x, layer=lambda: nn.Conv2d(2, 3, 3, padding=1)),
    "linear": Row(lambda x: x.flatten(1), lambda: nn.Linear(72, 6)),
    "relu": Row(F.relu),
    "add": Row(lambda x: x + x),
    "sub": Row(lambda x: x - x[:, [1, 0]]),
    "avg_pool2d": Row(lambda x: F.avg_pool2d(x, 2)),
    "mean": Row(lambda x: x.mean((2, 3), keepdim=True)),
    "flatten": Row(lambda x: x.flatten(1)),
    "concat": Row(lambda x: torch.cat([x, x], 1)),
    "subsample": Row(lambda x: x[:, :, ::2, ::2]),
    "take": Row(lambda x: x[:, [1, 0]]),
    "pad": Row(lambda x: F.pad(x, (1, 1, 1, 1))),
}
"""By the operation's name in `steps.OPS`."""


class FirstStep(nn.Module):
    """One row's operation, average pooling, then a linear layer, a ReLU and a linear layer."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row, self.layer = row, nn.Identity() if row.layer is None else row.layer()
        with torch.no_grad():
            size = self.features(torch.zeros(1, *IMAGE)).shape[1]
        self.hidden, self.relu, self.last = nn.Linear(size, 6), nn.ReLU(), nn.Linear(6, 3)

    def features(self, x: Tensor) -> Tensor:
        y = self.layer(self.row.apply(x))
        return y.flatten(1) if y.ndim == 2 or y.shape[2] == 1 else F.avg_pool2d(y, 3).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.hidden(self.features(x))))


class AllFirstSteps(nn.Module):
    """Every row, each with an exit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList(FirstStep(row) for row in ROWS.values())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(row(x) for row in self.rows)
