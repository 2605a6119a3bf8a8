"""Classifiers on pooled features, for point clouds.

*Self-Distillation* (TPAMI'21) does not say what its classifiers on ResGCN are. The attention modules and alignment nets
of its section 3.2 halve resolutions with 3x3 convolutions, which points in no order do not have. Here a shallow
classifier is what remains of both: maximum and average over points, as ResGCN's own head has them, and an MLP with one
hidden layer of as many units as the final classifier has features, so that features can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from shoal.exits.attention import final_layer, mark_features
from shoal.exits.classifiers import attach
from shoal.surgery.normal_form import edit


class PooledExit(nn.Module):
    """Maximum and average over points, linear-BN-ReLU (the features [N, D]), linear: (N, C, P, 1) -> (N, classes)."""

    def __init__(self, channels: int, features: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * channels, features, bias=False)
        self.bn = nn.BatchNorm1d(features)
        self.relu = nn.ReLU()
        self.features = nn.Identity()
        self.fc = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat((x.amax((2, 3)), x.mean((2, 3))), dim=1)
        return self.fc(self.features(self.relu(self.bn(self.hidden(pooled)))))


def add_pooled_exits(model: nn.Module, after: Sequence[str], classes: int, shape: tuple[int, ...]) -> fx.GraphModule:
    """A copy of `model` with a pooled classifier after each named submodule, for inputs of `shape` [C, P, 1].

    Its forward gives logits weak to strong; features lie where those of `add_aligned_exits` do. Raises ShoalError when
    a name has no feature map, and when the model does not end in a linear layer.
    """
    marked = edit(model, mark_features)
    features = final_layer(marked).in_features
    return attach(marked, after, shape, lambda site: PooledExit(site[0], features, classes))
