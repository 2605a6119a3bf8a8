"""ResNets of bottleneck blocks and variants: wide, ResNeXt, SENet (squeeze-and-excitation), ResNeSt.

Sources: He et al., CVPR'16; Zagoruyko & Komodakis, BMVC'16; Xie et al., CVPR'17; Hu et al., CVPR'18; Zhang et al.,
arXiv:2004.08955. The stem is a 3x3 convolution with stride 1 without max-pool, as in *Self-Distillation* (TPAMI'21,
section 4.1) for CIFAR-100: the maps of a 32x32 image are 32, 16, 8 and 4 wide in stages 1 to 4. Names that end in
``-imagenet`` have ImageNet's stem (see `shoal.models.resnet`).

SENet and ResNeSt multiply two values that are both private, so private inference rejects them. They can be trained and
counted like the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from shoal.models.blocks import Shortcut, make_shortcut, projection_shortcut
from shoal.models.resnet import BasicBlock, Design, ResNet, imagenet

EXPANSION = 4
"""Factor between the channels of a bottleneck's result and those of the same stage of a ResNet of basic blocks."""


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a gate in (0, 1), computed from the means of all channels (Hu et al., section 3).

    [N, C, H, W] -> the same shape.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Linear(channels, hidden)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.fc2(self.relu(self.fc1(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class GatedBasicBlock(BasicBlock):
    """`BasicBlock` with `SqueezeExcite` before the sum."""

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__(c_in, c_out, stride, shortcut)
        self.se = SqueezeExcite(c_out)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        return self.relu2(out + self.shortcut(x))


@dataclass(frozen=True)
class Inside:
    """What distinguishes one kind of `Bottleneck` from another.

    The 3x3 convolution has `ratio` times the channels of the block's result, in `groups` groups. With `gated`, a
    `SqueezeExcite` precedes the sum.
    """

    ratio: float = 1 / EXPANSION
    groups: int = 1
    gated: bool = False


PLAIN = Inside()
"""The bottleneck of ResNet-50."""


class Bottleneck(nn.Module):
    """1x1-BN-relu1, 3x3-BN-relu2, 1x1-BN, plus the shortcut, then relu3 (He et al., Fig. 5, right).

    (N, c_in, H, W) -> (N, c_out, ceil(H/stride), ceil(W/stride)). The 3x3 convolution has the stride, as in
    torchvision.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: Shortcut, inside: Inside = PLAIN) -> None:
        super().__init__()
        groups = inside.groups
        inner = groups * max(1, round(c_out * inside.ratio / groups))
        self.conv1 = nn.Conv2d(c_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.se = SqueezeExcite(c_out) if inside.gated else nn.Identity()
        self.shortcut = make_shortcut(c_in, c_out, stride, shortcut)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.se(self.bn3(self.conv3(out)))
        return self.relu3(out + self.shortcut(x))


class SplitAttention(nn.Module):
    """A 3x3 convolution with two results, summed with learned weights per channel (ResNeSt, sec. 3.1, radix 2).

    (N, c, H, W) -> the same shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=2, bias=False)
        self.bn = nn.BatchNorm2d(2 * channels)
        self.relu = nn.ReLU()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.chunk(self.relu(self.bn(self.conv(x))), 2, 1)
        pooled = (first + second).mean((2, 3), keepdim=True)
        one, other = torch.chunk(self.fc2(self.relu1(self.bn1(self.fc1(pooled)))), 2, 1)
        # A softmax over two values is the sigmoid of their difference.
        weight = torch.sigmoid(one - other)
        return first * weight + second * (1 - weight)


class SplitBottleneck(nn.Module):
    """`Bottleneck` with `SplitAttention`; a stride is an average pool (settings of ResNeSt-50, section 4).

    Shapes as in `Bottleneck`. The ReLU inside `SplitAttention` takes the place of relu2.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        inner = max(1, c_out // EXPANSION)
        self.conv1 = nn.Conv2d(c_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.split = SplitAttention(inner)
        self.pool = nn.AvgPool2d(3, stride, padding=1) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(inner, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut = make_shortcut(c_in, c_out, stride, shortcut)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.pool(self.split(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu3(self.bn3(self.conv3(out)) + self.shortcut(x))


def pooled_shortcut(c_in: int, c_out: int, stride: int) -> nn.Module:
    """Average pool, 1x1 convolution and BatchNorm (He et al., arXiv:1812.01187, ResNet-D).

    Shapes as in `Bottleneck`.
    """
    # With ceil_mode both paths give ceil(H/stride) for odd maps; a window at the edge averages the values inside.
    pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
    return nn.Sequential(pool, nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))


DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Depth -> number of blocks in each stage (He et al., Table 1)."""


def _deep(
    depth: int, block: Callable[..., nn.Module], shortcut: Shortcut = projection_shortcut
) -> Callable[..., nn.Module]:
    return partial(ResNet, _design(depth, block, shortcut))


def _design(depth: int, block: Callable[..., nn.Module], shortcut: Shortcut = projection_shortcut) -> Design:
    return Design(DEPTHS[depth], 64, shortcut, block=block, expansion=EXPANSION)


_WIDE = partial(Bottleneck, inside=Inside(ratio=1 / 2))
_GROUPED = partial(Bottleneck, inside=Inside(ratio=1 / 2, groups=32))
_GATED = partial(Bottleneck, inside=Inside(gated=True))

BUILDERS: dict[str, Callable[..., nn.Module]] = (
    {f"resnet{depth}": _deep(depth, Bottleneck) for depth in DEPTHS}
    | {f"resnet{depth}-imagenet": imagenet(_design(depth, Bottleneck)) for depth in DEPTHS}
    | {f"wrn{depth}-2": _deep(depth, _WIDE) for depth in (50, 101)}
    | {"wrn50-2-imagenet": imagenet(_design(50, _WIDE)), "resnext50-4-imagenet": imagenet(_design(50, _GROUPED))}
    | {
        "senet18": partial(ResNet, Design((2, 2, 2, 2), 64, projection_shortcut, block=GatedBasicBlock)),
        "senet50": _deep(50, _GATED),
        "senet101": _deep(101, _GATED),
        # In the first stage, 32 groups of 4 channels (_GROUPED), and 32 groups of 8.
        "resnext50-4": _deep(50, _GROUPED),
        "resnext101-8": _deep(101, partial(Bottleneck, inside=Inside(ratio=1, groups=32))),
        "resnest50": _deep(50, SplitBottleneck, pooled_shortcut),
    }
)
