"""A small network with two classifiers, for commands that refuse such."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TwoClassifiers(nn.Module):
    """A classifier after each of two convolutions."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.weak, self.strong = nn.Linear(4, classes), nn.Linear(4, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.first(x))
        return self.weak(x.mean((2, 3))), self.strong(torch.relu(self.second(x)).mean((2, 3)))
