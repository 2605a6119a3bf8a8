"""Classifiers on pooled features, for point clouds.

*Self-Distillation* (TPAMI'21) does not describe its classifiers on ResGCN. The attention modules and alignment networks
of its section 3.2 halve the resolution with 3x3 convolutions, which need a grid. Here a shallow classifier pools by
maximum and average over points, as the head of ResGCN does, and applies an MLP with one hidden layer. The hidden layer
has as many units as the final classifier has features, so that features can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from shoal.exits.attention import final_layer, mark_features
from shoal.exits.classifiers import attach
from shoal.surgery.normal_form import edit


class PooledExit(nn.Module):
    """Maximum and average over points, linear-BN-ReLU (the features [N, D]), linear: [N, C, P, 1] -> [N, classes]."""

    def __init__(self, channels: int, features: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * channels, features, bias=False)
        self.bn = nn.BatchNorm1d(features)
        self.relu = nn.ReLU()
        self.features = nn.Identity()
        self.fc = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] for features [N, C, P, 1]."""
        pooled = torch.cat((x.amax((2, 3)), x.mean((2, 3))), dim=1)
        return self.fc(self.features(self.relu(self.bn(self.hidden(pooled)))))


def add_pooled_exits(model: nn.Module, after: Sequence[str], classes: int, shape: tuple[int, ...]) -> fx.GraphModule:
    """A copy of `model` with a pooled classifier after each named submodule, for inputs of `shape` [C, P, 1].

    Its forward pass returns all logits, weakest first. Features have the same names as those of `add_aligned_exits`.
    Raises ShoalError when a name has no feature map, and when the model does not end in a linear layer.
    """
    marked = edit(model, mark_features)
    features = final_layer(marked).in_features
    return attach(marked, after, shape, lambda site: PooledExit(site[0], features, classes))
