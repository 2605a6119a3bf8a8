"""ResNets with four stages (64-512 channels, 1x1 shortcuts) or three (16-64 channels, option A or 1x1 shortcuts).

Sources: He et al., CVPR'16 (section 4.2 for the three-stage nets); DeepReDuce, ICML'21, section 5.3 and
Table 7 for resnet9 and resnet10. Shapes are (N, C, H, W); the maps of a 32x32 image are 32, 16, 8 and 4 wide in stages
1 to 4. Names that end in ``-imagenet`` have ImageNet's stem (He et al., Table 1): 7x7 convolution with stride 2 and
3x3 max pool with stride 2, so the maps of a 224x224 image are 56, 28, 14 and 7 wide.

In every block here `relu1` is the inner ReLU, and `relu2` follows the sum. `ResNet` also accepts the blocks of
`shoal.models.bottleneck`, which have two inner ReLUs and `relu3` after the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor, nn

from shoal.models.blocks import (
    STEM_STRIDE,
    PadShortcut,
    Shortcut,
    conv3x3,
    conv7x7,
    init_weights,
    make_shortcut,
    projection_shortcut,
    scale_channels,
)


class BasicBlock(nn.Module):
    """conv-BN-relu1-conv-BN, plus the shortcut, then relu2 (He et al., Fig. 2).

    (N, c_in, H, W) -> (N, c_out, ceil(H/stride), ceil(W/stride)).
    """

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(c_out, c_out)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = make_shortcut(c_in, c_out, stride, shortcut)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class SingleConvBlock(nn.Module):
    """conv-BN, plus the shortcut, then relu2: the first block of resnet9; shapes as in `BasicBlock`.

    DeepReDuce section 5.3: "there is only one 3x3 convolution layer in the first residual block of S1".
    """

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.shortcut = make_shortcut(c_in, c_out, stride, shortcut)
        # Not named relu1, which is the inner ReLU of a block; this block has none.
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.bn1(self.conv1(x)) + self.shortcut(x))


Block = Callable[[int, int, int, Shortcut], nn.Module]
"""A function (c_in, c_out, stride, shortcut) -> a block."""


@dataclass(frozen=True)
class Design:
    """The architecture of a `ResNet`.

    `depths` is the number of blocks in each stage. Stage i (from 0) has `planes` * 2**i * `expansion` channels; the
    stem has `planes`. `first_block`, if given, replaces the first block of the first stage. `stem` is ``cifar`` (3x3
    convolution) or ``imagenet`` (7x7 convolution with stride 2, then a 3x3 max pool with stride 2).
    """

    depths: tuple[int, ...]
    planes: int
    shortcut: Shortcut
    block: Block = BasicBlock
    first_block: Block | None = None
    expansion: int = 1
    stem: Literal["cifar", "imagenet"] = "cifar"


class ResNet(nn.Module):
    """Stem (conv, BN, `relu`, with ImageNet's stem `maxpool`), stages `layer1`..., global average pool, `fc`.

    (N, channels, H, W) -> logits (N, classes), any H and W. `width` multiplies the channels of the design; every
    stage but the first halves the height and width of the map.
    """

    def __init__(
        self, design: Design, classes: int, *, channels: int = 3, width: float = 1.0, resolution: float = 1.0
    ) -> None:
        super().__init__()
        c_in = scale_channels(design.planes, width)
        self.pools = large = design.stem == "imagenet"
        stride = STEM_STRIDE[resolution]
        self.conv1 = conv7x7(channels, c_in, 2 * stride) if large else conv3x3(channels, c_in, stride)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu = nn.ReLU()
        if large:
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        # Stages are direct children, so that paths are `layer1.0.relu1` as in torchvision.
        self.stage_names = tuple(f"layer{i + 1}" for i in range(len(design.depths)))
        for i, (name, depth) in enumerate(zip(self.stage_names, design.depths, strict=True)):
            c_out = scale_channels(design.planes * 2**i * design.expansion, width)
            first = design.block if design.first_block is None or i > 0 else design.first_block
            head = first(c_in, c_out, 1 if i == 0 else 2, design.shortcut)
            tail = [design.block(c_out, c_out, 1, design.shortcut) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(head, *tail))
            c_in = c_out
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c_in, classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        if self.pools:
            x = self.maxpool(x)
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        return self.fc(self.avgpool(x).flatten(1))


def cifar_resnet(depth: int, shortcut: Shortcut = PadShortcut) -> Callable[..., ResNet]:
    """A builder of the network with three stages of 16, 32, 64 channels and `depth` = 6n + 2 (He et al., sec. 4.2)."""
    return partial(ResNet, Design((depth // 6,) * 3, 16, shortcut))


def imagenet(design: Design) -> Callable[..., ResNet]:
    """A builder of the network of `design` with ImageNet's stem; torchvision's names are the same up to `layer4`."""
    return partial(ResNet, replace(design, stem="imagenet"))


_RESNET18 = Design((2, 2, 2, 2), 64, projection_shortcut)
_RESNET34 = Design((3, 4, 6, 3), 64, projection_shortcut)

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet9": partial(ResNet, Design((1, 1, 1, 1), 64, projection_shortcut, first_block=SingleConvBlock)),
    "resnet10": partial(ResNet, Design((1, 1, 1, 1), 64, projection_shortcut)),
    "resnet18": partial(ResNet, _RESNET18),
    "resnet34": partial(ResNet, _RESNET34),
}
BUILDERS |= {f"resnet{depth}": cifar_resnet(depth) for depth in (20, 32, 44, 56, 110)}
# With projection shortcuts, as in the public code of online distillation methods (ONE, FFL).
BUILDERS |= {f"resnet{depth}-projection": cifar_resnet(depth, projection_shortcut) for depth in (32, 110)}
BUILDERS |= {"resnet18-imagenet": imagenet(_RESNET18), "resnet34-imagenet": imagenet(_RESNET34)}
