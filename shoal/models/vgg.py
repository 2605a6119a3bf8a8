"""VGG16 for small images (Simonyan & Zisserman, ICLR'15, configuration D), with BatchNorm and one linear layer.

There are five stages of 2, 2, 3, 3 and 3 convolutions (DeepReDuce's S1 to S5), with a pool between two stages. The
fifth pool of the paper is replaced by the global average pool. With a `resolution` below 1 the last pools are left out,
one for 0.5 and two for 0.25, since small images would have no pixels left. `vgg16` has max pools as in the paper;
`vgg16-avg` has average pools, which need no communication in private inference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from shoal.models.blocks import STEM_STRIDE, conv3x3, init_weights, scale_channels

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions of each stage."""


class ConvUnit(nn.Module):
    """Conv-BN-ReLU: (N, c_in, H, W) -> (N, c_out, ceil(H/stride), ceil(W/stride))."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = conv3x3(c_in, c_out, stride)
        self.bn = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class VGG(nn.Module):
    """`layer1` to `layer5` (units, and a pool in all but the last layers), global average pool, `fc`.

    (N, channels, H, W) -> logits (N, classes); H and W must be at least 16.
    """

    def __init__(
        self, pool: type[nn.Module], classes: int, *, channels: int = 3, width: float = 1.0, resolution: float = 1.0
    ) -> None:
        super().__init__()
        before, stride = channels, STEM_STRIDE[resolution]
        for i, (count, depth) in enumerate(STAGES):
            after = scale_channels(count, width)
            units = [ConvUnit(before if j == 0 else after, after, stride if i == j == 0 else 1) for j in range(depth)]
            pooled = i < len(STAGES) - 1 - STEM_STRIDE[resolution] // 2
            self.add_module(f"layer{i + 1}", nn.Sequential(*units, *([pool(2)] if pooled else [])))
            before = after
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(STAGES)):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "vgg16": partial(VGG, nn.MaxPool2d),
    "vgg16-avg": partial(VGG, nn.AvgPool2d),
}
