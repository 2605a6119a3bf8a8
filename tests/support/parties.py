"""Small networks that the tests of private inference compile, and their artifacts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shoal.graph.graph import Graph
from shoal.private.compiler.compilation import compile
from shoal.private.program.artifact import save_artifact
from shoal.private.program.program import Program, Weights
from shoal.surgery.tracing import trace

SHAPE = (1, 8, 8)


class Small(nn.Module):
    """A masked ReLU between two convolutions, average pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.relu = nn.ReLU()
        self.body = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.relu2 = nn.ReLU()
        self.pool = nn.AvgPool2d(2)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.body(self.relu(self.stem(x))))
        return self.last(self.pool(x).flatten(1))


class Everything(nn.Module):
    """Every operation of a program, two exits, a grouped and a dilated convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.group = nn.Conv2d(4, 6, (3, 1), padding=(1, 0), groups=2)
        self.relu2 = nn.ReLU()
        self.wide = nn.Conv2d(6, 4, 3, padding=2, dilation=2)
        self.early = nn.Linear(4, 3)
        self.down = nn.Conv2d(8, 4, 3, stride=(2, 1), padding=1)
        self.pool = nn.AvgPool2d((2, 3), stride=(1, 2))
        self.hidden = nn.Linear(4 * 4 * 4, 6)
        self.relu3 = nn.ReLU()
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.relu(self.stem(x))
        y = self.wide(self.relu2(self.group(x))) + x
        early = self.early(y.mean((2, 3)))
        z = self.down(torch.cat([x, y], 1)) - y[:, :, ::2, ::1]
        z = torch.cat([z[:, 3:], z[:, :3]], 1)
        z = nn.functional.pad(z, (1, 0, 0, 1))
        return early, self.last(self.relu3(self.hidden(self.pool(z).flatten(1))))


@dataclass(frozen=True)
class Case:
    """A compiled network, its artifact, and images."""

    graph: Graph
    program: Program
    weights: Weights
    folder: Path
    images: Tensor

    @property
    def unit(self) -> float:
        return 2.0**-self.program.fraction_bits

    def truth(self, count: int) -> np.ndarray:
        with torch.no_grad():
            return self.graph(self.images[:count])[-1].double().numpy()


def case(
    model: nn.Module,
    folder: Path,
    masks: dict[str, Tensor],
    ot_kind: str = "YACL_Softspoken",
    shape: tuple[int, ...] = SHAPE,
) -> Case:
    graph = trace(model.eval(), shape)
    graph = replace(graph, weights=graph.weights | {f"{k}.mask": m for k, m in masks.items()})
    images = torch.randn(64, *shape, generator=torch.Generator().manual_seed(1))
    program, weights = compile(graph, images)
    save_artifact(folder, program, weights, ot_kind=ot_kind)
    return Case(graph, program, weights, folder, images)


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind()


def small_mask() -> Tensor:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(5)) < 0.4
