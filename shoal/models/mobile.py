"""MobileNetV2 (Sandler et al., CVPR'18) and ShuffleNetV2 (Ma et al., ECCV'18) for small images.

Compared with the networks for ImageNet, both stems have stride 1 and not 2, there is no max-pool, and MobileNetV2's
first strided block has stride 1, so that a 32x32 image ends as a 4x4 map. ReLU replaces ReLU6, as in MobileNetV1 here:
private inference then needs one comparison per value and not two, and all networks have the same kind of ReLU site.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shoal.models.blocks import STEM_STRIDE, init_weights, scale_channels

STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""MobileNetV2's stages: expansion, channels, blocks, stride of the first block (Table 2, with strides for CIFAR)."""

SHUFFLE_STAGES = ((58, 4), (116, 8), (232, 4))
"""ShuffleNetV2 1x: channels of one branch and number of blocks in each stage, whose first has stride 2 (Table 5)."""


def conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution, BatchNorm and, if `relu`, a ReLU.

    (N, c_in, H, W) -> (N, c_out, ceil(H/stride), ceil(W/stride)) for odd kernels.
    """
    conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    layers: list[tuple[str, nn.Module]] = [("conv", conv), ("bn", nn.BatchNorm2d(c_out))]
    result = nn.Sequential()
    for name, layer in [*layers, *([("relu", nn.ReLU())] if relu else [])]:
        result.add_module(name, layer)
    return result


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1, plus the input if the shape is the same (Sandler et al., Fig. 4).

    (N, c_in, H, W) -> (N, c_out, ceil(H/stride), ceil(W/stride)).
    """

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = c_in * expansion
        self.expand = conv_bn(c_in, inner, 1) if expansion > 1 else nn.Identity()
        self.depthwise = conv_bn(inner, inner, 3, stride, groups=inner)
        self.project = conv_bn(inner, c_out, 1, relu=False)
        self.keeps = stride == 1 and c_in == c_out
        self.out = nn.Identity()  # no ReLU follows the sum, so this names the result for exits

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return self.out(x + out if self.keeps else out)


class MobileNetV2(nn.Module):
    """`stem`, `blocks`, `head`, global average pool, `fc`: (N, channels, H, W) -> logits (N, classes), any H and W."""

    def __init__(self, classes: int, *, channels: int = 3, width: float = 1.0, resolution: float = 1.0) -> None:
        super().__init__()
        before = scale_channels(32, width)
        self.stem = conv_bn(channels, before, 3, STEM_STRIDE[resolution])
        blocks = []
        for expansion, count, depth, stride in STAGES:
            for i in range(depth):
                after = scale_channels(count, width)
                blocks.append(InvertedResidual(before, after, stride if i == 0 else 1, expansion))
                before = after
        self.blocks = nn.Sequential(*blocks)
        last = scale_channels(1280, width)
        self.head = conv_bn(before, last, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.head(self.blocks(self.stem(x)))).flatten(1))


class ShuffleBlock(nn.Module):
    """Two branches of `branch` channels, concatenated and shuffled (Ma et al., Fig. 3 c and d).

    With stride 1 the first half of the channels passes unchanged, and (N, 2 branch, H, W) keeps its shape. With stride
    2 both branches read all channels: (N, c_in, H, W) -> (N, 2 branch, ceil(H/2), ceil(W/2)).
    """

    def __init__(self, c_in: int, branch: int, stride: int) -> None:
        super().__init__()
        self.splits = stride == 1
        read = branch if self.splits else c_in
        self.main = nn.Sequential(
            conv_bn(read, branch, 1),
            conv_bn(branch, branch, 3, stride, groups=branch, relu=False),
            conv_bn(branch, branch, 1),
        )
        side = (conv_bn(c_in, c_in, 3, stride, groups=c_in, relu=False), conv_bn(c_in, branch, 1))
        self.side = nn.Identity() if self.splits else nn.Sequential(*side)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.chunk(x, 2, 1) if self.splits else (x, x)
        return self.shuffle(torch.cat((self.side(first), self.main(second)), 1))


class ShuffleNetV2(nn.Module):
    """`stem`, `stages`, `head`, global average pool, `fc`: (N, channels, H, W) -> logits (N, classes), any H and W."""

    def __init__(self, classes: int, *, channels: int = 3, width: float = 1.0, resolution: float = 1.0) -> None:
        super().__init__()
        before = scale_channels(24, width)
        self.stem = conv_bn(channels, before, 3, STEM_STRIDE[resolution])
        stages = []
        for count, depth in SHUFFLE_STAGES:
            branch = scale_channels(count, width)
            tail = [ShuffleBlock(2 * branch, branch, 1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(ShuffleBlock(before, branch, 2), *tail))
            before = 2 * branch
        self.stages = nn.Sequential(*stages)
        last = scale_channels(1024, width)
        self.head = conv_bn(before, last, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.head(self.stages(self.stem(x)))).flatten(1))


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mobilenetv2": MobileNetV2,
    "shufflenetv2": ShuffleNetV2,
}
