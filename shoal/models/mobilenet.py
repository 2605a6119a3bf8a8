"""MobileNetV1 for small images (Howard et al., arXiv:1704.04861): 13 pairs of depthwise and pointwise convolutions.

The stem has stride 1, and not 2 as for ImageNet. It has 411,648 ReLUs at 32x32, as in DeepReDuce (ICML'21, sec. 5.6).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from shoal.models.blocks import STEM_STRIDE, init_weights, scale_channels

PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""Result channels and stride of each pair."""


class Pair(nn.Module):
    """Depthwise 3x3-BN-relu1, pointwise 1x1-BN-relu2: (N, c_in, H, W) -> (N, c_out, ceil(H/stride), ceil(W/stride))."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_in, 3, stride=stride, padding=1, groups=c_in, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)))


class MobileNetV1(nn.Module):
    """Stem (`conv1`, `bn1`, `relu`), `pairs`, global average pool, `fc`: (N, channels, H, W) -> logits (N, classes)."""

    def __init__(self, classes: int, *, channels: int = 3, width: float = 1.0, resolution: float = 1.0) -> None:
        super().__init__()
        before = scale_channels(32, width)
        self.conv1 = nn.Conv2d(channels, before, 3, stride=STEM_STRIDE[resolution], padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(before)
        self.relu = nn.ReLU()
        pairs = []
        for count, stride in PAIRS:
            after = scale_channels(count, width)
            pairs.append(Pair(before, after, stride))
            before = after
        self.pairs = nn.Sequential(*pairs)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pairs(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(x).flatten(1))


BUILDERS: dict[str, Callable[..., nn.Module]] = {"mobilenetv1": MobileNetV1}
