"""ResGCN: residual graph convolutions on point clouds [N, 3, P, 1], for Table 4 of *Self-Distillation* (TPAMI'21).

Source: Li et al., *DeepGCNs: Can GCNs Go as Deep as CNNs?* (ICCV'19). The backbone has EdgeConv layers with k = 16
neighbours and 64 channels, residual from the second layer on, and dilations that increase by 1 per layer. A fusion
block concatenates the features of all layers, with a 1x1 convolution to 1024 channels and pooling over points. An MLP
follows. For classification the fused features are pooled by maximum and average, and the MLP has 512 and 256 hidden
units with dropout 0.5, as in DGCNN (TOG'19, section 5.1). The number in a name is that of EdgeConv layers.

*Self-Distillation* gives only the names "ResGCN8, 12, 16"; k, channels and points are those of DeepGCNs.

Parameters with c = 64 w, f = 1024 w, h1 = 512 w, h2 = 256 w for width w (rounded), depth L and C classes:
(6 c + 2 c) + (L - 1)(2 c^2 + 2 c) + (L c f + 2 f) + (2 f h1 + 2 h1) + (h1 h2 + 2 h2) + (h2 C + C).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.models.blocks import init_weights, scale_channels
from shoal.models.point_graph import EdgeFeatures

NEIGHBOURS = 16


class EdgeConv(nn.Module):
    """Maximum over neighbours j of ReLU(BN(W (x_i, x_j - x_i))): [N, c_in, P, 1] -> [N, c_out, P, 1]."""

    def __init__(self, c_in: int, c_out: int, dilation: int = 1) -> None:
        super().__init__()
        self.edges = EdgeFeatures(NEIGHBOURS, dilation)
        self.conv = nn.Conv2d(2 * c_in, c_out, 1, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(self.edges(x)))).amax(3, keepdim=True)


class ResidualEdgeConv(nn.Module):
    """x + EdgeConv(x), [N, C, P, 1]; `out` names the sum, so that exits can be attached there."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.body = EdgeConv(channels, channels, dilation)
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.body(x))


class ResGCN(nn.Module):
    """Stem, blocks, fusion, maximum and average over points, MLP: (N, channels, P, 1) -> logits (N, classes).

    P must be at least 16. The logits do not depend on the order of the points, up to rounding. `width` multiplies all
    hidden sizes. Raises ShoalError for a resolution other than 1.
    """

    def __init__(
        self, depth: int, classes: int, *, channels: int = 3, width: float = 1.0, resolution: float = 1.0
    ) -> None:
        super().__init__()
        if resolution != 1:
            raise ShoalError(
                f"found resolution {resolution!r} for resgcn{depth}; need 1, as a cloud has no grid; use width instead"
            )
        c, fused, *hidden = (scale_channels(size, width) for size in (64, 1024, 512, 256))
        self.stem = EdgeConv(channels, c)
        self.blocks = nn.ModuleList(ResidualEdgeConv(c, dilation=i) for i in range(1, depth))
        self.fusion = nn.Conv2d(depth * c, fused, 1, bias=False)
        self.fusion_bn = nn.BatchNorm2d(fused)
        self.fusion_relu = nn.ReLU()
        self.head = nn.Sequential(hidden_layer(2 * fused, hidden[0]), hidden_layer(hidden[0], hidden[1]))
        self.fc = nn.Linear(hidden[1], classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for block in self.blocks:
            features.append(block(features[-1]))
        x = self.fusion_relu(self.fusion_bn(self.fusion(torch.cat(features, dim=1))))
        return self.fc(self.head(torch.cat((x.amax((2, 3)), x.mean((2, 3))), dim=1)))


def hidden_layer(c_in: int, c_out: int) -> nn.Sequential:
    """Linear-BN-ReLU-dropout: (N, c_in) -> (N, c_out)."""
    # No bias, since the batch norm has a shift.
    layers = {"fc": nn.Linear(c_in, c_out, bias=False), "bn": nn.BatchNorm1d(c_out), "relu": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers | {"dropout": nn.Dropout(0.5)}))


BUILDERS: dict[str, Callable[..., nn.Module]] = {f"resgcn{depth}": partial(ResGCN, depth) for depth in (8, 12, 16)}
