"""Families of public CIFAR networks: a small network of each, for images of `IMAGE`, and whether it runs in private."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tests.surgery.public import (
    CLASSES,
    Call,
    Cell,
    ChannelsLast,
    Classified,
    Dense,
    DropPath,
    DualPath,
    Excitation,
    FlatExcitation,
    Fractal,
    Ghost,
    Harmonic,
    ManyBranches,
    OptionA,
    Resolutions,
    Samepadded,
    Scales,
    Separable,
    ShuffledSplit,
    Standardised,
    StochasticDepth,
    after_stem,
    attended,
    cells,
    conv_bn,
    conv_relu,
    mixer,
    padded_with_zeros,
    shortcut_d,
)


def all_convolutional() -> nn.Module:
    layers = [conv_relu(3, 8), nn.Dropout(0.5), conv_relu(8, 8, 3, 2), nn.Conv2d(8, CLASSES, 1)]
    return Call(lambda m, x: F.adaptive_avg_pool2d(m.features(x), 1).squeeze_(-1).squeeze_(-1),
                features=nn.Sequential(*layers))  # fmt: skip


def minionn() -> nn.Module:
    layers = [("conv", nn.Conv2d(3, 8, 3, padding=1)), ("relu", nn.ReLU()), ("pool", nn.AvgPool2d(2))]
    return nn.Sequential(OrderedDict([*layers, ("flat", nn.Flatten()), ("fc", nn.Linear(512, CLASSES))]))


def squeezed() -> nn.Module:
    return Call(lambda m, x: m.fc(m.pool(m.body(x)).squeeze()), body=conv_relu(3, 8), pool=nn.AdaptiveAvgPool2d(1),
                fc=nn.Linear(8, CLASSES))  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Networks of one kind: a specimen, what in it was tried, and what cannot run in private, or nothing."""

    make: Callable[[], nn.Module]
    idiom: str
    refused: str = ""


def excited(excitation: nn.Module) -> nn.Module:
    return after_stem(Call(lambda m, x: F.relu(m.se(m.conv(x)) + x), conv=conv_bn(8, 8), se=excitation))


def activated(act: Callable[[], nn.Module]) -> nn.Module:
    inverted = nn.Sequential(conv_relu(8, 16, 1, act=act), conv_relu(16, 16, 3, 1, 16, act=act), conv_bn(16, 8, 1))
    return after_stem(Call(lambda m, x: x + m.drop(m.conv(x)), conv=inverted, drop=DropPath()))


def efficient() -> nn.Module:
    block = nn.Sequential(conv_relu(8, 8, act=nn.SiLU), Excitation(), conv_bn(8, 8, 1))
    return after_stem(Call(lambda m, x: x + m.drop(m.conv(x)), conv=block, drop=DropPath()))


FAMILIES: dict[str, Family] = {
    "LeNet, MiniONN, DELPHI, Cryptonas": Family(minionn, "layers by name (OrderedDict), average pools"),
    "All-CNN, NiN": Family(all_convolutional, "no linear layer, `squeeze_(-1)` of the result"),
    "VGG, AlexNet": Family(
        lambda: Classified(nn.Sequential(conv_relu(3, 8), nn.MaxPool2d(2, 2), nn.AvgPool2d(1, stride=1))),
        "a list of layers from numbers, `view(n, -1)`",
    ),
    "ResNet, option A": Family(lambda: after_stem(OptionA(), channels=16), "`F.pad(x[:, :, ::2, ::2], ...)`, `+=`"),
    "any, `squeeze()`": Family(squeezed, "`squeeze()` after a global pool"),
    "ResNet-D": Family(lambda: after_stem(shortcut_d(ceil_mode=True)), "shortcuts with average pools, `ceil_mode`"),
    "timm's ResNet-D": Family(
        lambda: after_stem(shortcut_d(ceil_mode=True, count_include_pad=False)),
        "average pools with `count_include_pad=False` and no padding",
    ),
    "Wide ResNet": Family(
        lambda: after_stem(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Dropout(p=0.3))),
        "batch norm before the convolution, dropout",
    ),
    "PyramidNet": Family(
        lambda: after_stem(Call(padded_with_zeros, conv=conv_bn(8, 16, 3, 2)), channels=16),
        "channels of zeros that forward makes",
    ),
    "Stochastic depth": Family(lambda: after_stem(StochasticDepth()), "blocks dropped at random in training"),
    "DenseNet": Family(
        lambda: after_stem(Dense(), channels=12), "a list of features, `isinstance`, functional dropout"
    ),
    "DPN": Family(lambda: after_stem(DualPath(), channels=14), "slices that are added and joined"),
    "SimpleDLA, HarDNet": Family(lambda: after_stem(Harmonic(), channels=24), "lists of earlier features by number"),
    "GoogLeNet, Inception": Family(
        lambda: after_stem(
            Call(
                lambda m, x: torch.cat([b(x) for b in m.children()], 1),
                a=conv_relu(8, 4, 1),
                b=nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_relu(8, 4, 1)),
            )
        ),
        "branches in a list comprehension",
    ),
    "torchvision's GoogLeNet": Family(
        lambda: Call(
            lambda m, x: m.net(torch.cat([torch.unsqueeze(x[:, i], 1) * 0.5 + 0.1 for i in range(3)], 1)),
            net=after_stem(),
        ),
        "`transform_input`",
    ),
    "PNASNet": Family(lambda: after_stem(Cell(), channels=16), "separable convolutions, pools and sums, joined"),
    "NASNet": Family(
        lambda: after_stem(Call(cells, first=conv_relu(8, 8), cells=nn.ModuleList([conv_relu(8, 8), conv_relu(8, 8)]))),
        "cells that read the two before",
    ),
    "FractalNet": Family(lambda: after_stem(Fractal()), "`torch.stack(...).mean(0)` of paths"),
    "Xception": Family(
        lambda: after_stem(Call(lambda m, x: m.a(x) + m.b(x), a=Separable(), b=conv_bn(8, 8, 1, 2))),
        "the ReLU first, separable convolutions",
    ),
    "SqueezeNet": Family(
        lambda: Call(lambda m, x: m.c(m.body(x)).mean([2, 3]), body=conv_relu(3, 8), c=nn.Conv2d(8, CLASSES, 1)),
        "a convolution as classifier, `mean([2, 3])`",
    ),
    "MobileNet": Family(lambda: after_stem(conv_relu(8, 8, 3, 2, 8), conv_relu(8, 8, 1)), "depthwise convolutions"),
    "MobileNetV2": Family(lambda: activated(nn.ReLU6), "ReLU6", "relu6"),
    "MobileNetV3": Family(lambda: activated(nn.Hardswish), "hard swish", "Hardswish"),
    "ShuffleNet": Family(lambda: after_stem(nn.ChannelShuffle(2), conv_relu(8, 8, 1, 1, 2)), "channel shuffle"),
    "ShuffleNetV2": Family(lambda: after_stem(ShuffledSplit()), "a split by ratio, shuffle by view and permute"),
    "GhostNet without SE": Family(lambda: after_stem(Ghost(), channels=7), "more channels than asked for, cut off"),
    "Res2Net": Family(lambda: after_stem(Scales()), "`torch.split`, a loop over layers"),
    "RepVGG, MobileOne": Family(lambda: after_stem(ManyBranches()), "parallel branches, `hasattr`, `0 + x`"),
    "ResNeXt, RegNetX": Family(lambda: after_stem(conv_relu(8, 8, 3, 1, 4)), "groups"),
    "SENet, RegNetY": Family(lambda: excited(Excitation()), "squeeze-excite", "Sigmoid"),
    "SENet with linear layers": Family(
        lambda: excited(FlatExcitation()), "squeeze-excite with `view(b, c, 1, 1).expand_as(x)`", "Sigmoid"
    ),
    "EfficientNet": Family(efficient, "SiLU, squeeze-excite, DropPath", "SiLU"),
    "Residual attention": Family(
        lambda: after_stem(Call(attended, mask=conv_bn(8, 8), trunk=conv_bn(8, 8))), "a mask by sigmoid", "interpolate"
    ),
    "ConvMixer": Family(lambda: mixer(nn.GELU), "GELU, residual functions", "GELU"),
    "ConvMixer with ReLUs": Family(lambda: mixer(nn.ReLU), "`padding='same'`, batch norm after the activation"),
    "HRNet, nearest neighbour": Family(lambda: after_stem(Resolutions("nearest")), "two resolutions"),
    "HRNet, bilinear": Family(lambda: after_stem(Resolutions("bilinear")), "two resolutions", "interpolate"),
    "ConvNeXt": Family(lambda: after_stem(ChannelsLast()), "layer norm, channels last", "permute"),
    "BiT": Family(
        lambda: after_stem(Standardised(8, 8, 3, padding=1), nn.GroupNorm(4, 8)),
        "standardised weights, group norm",
        "GroupNorm",
    ),
    "NFNet with ReLUs": Family(
        lambda: after_stem(Standardised(8, 8, 3, padding=1), nn.ReLU()), "standardised weights without a norm"
    ),
    "Ports of TensorFlow": Family(
        lambda: after_stem(Samepadded(8, 8, 3, 2), nn.ReLU()), "padding that depends on the size"
    ),
    "MFM (LightCNN)": Family(
        lambda: after_stem(Call(lambda m, x: torch.max(*torch.split(x, 4, 1))), channels=4),
        "the maximum of two halves",
        "max",
    ),
}
"""Families of networks -> a specimen."""
