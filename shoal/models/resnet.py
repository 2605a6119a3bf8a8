"""CIFAR ResNets: four stages (64-512, 1x1 shortcuts) and three stages (16-64, option A shortcuts, or 1x1 ones).

Sources: He et al., CVPR'16 (section 4.2 for the three-stage nets); DeepReDuce, ICML'21, section 5.3 and
Table 7 for resnet9 and resnet10. Shapes are (N, C, H, W); a 32x32 image is 32, 16, 8, 4 wide in stages 1-4.

Every block here keeps one contract: `relu1` is the inner ReLU, `relu2` follows the sum. `ResNet` also takes the blocks
of `shoal.models.bottleneck`, which have two inner ReLUs and `relu3` after the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from shoal.models.blocks import (
    STEM_STRIDE,
    PadShortcut,
    Shortcut,
    conv3x3,
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
    """conv-BN, plus the shortcut, then relu2: what resnet9 has for its first stage; shapes as `BasicBlock`.

    DeepReDuce section 5.3: "there is only one 3x3 convolution layer in the first residual block of S1".
    """

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.shortcut = make_shortcut(c_in, c_out, stride, shortcut)
        # Not relu1: that name is the inner ReLU of a block, and this block has none.
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.bn1(self.conv1(x)) + self.shortcut(x))


Block = Callable[[int, int, int, Shortcut], nn.Module]
"""(c_in, c_out, stride, shortcut) -> a block."""


class ResNet(nn.Module):
    """Stem (3x3 conv, BN, `relu`; no max-pool), stages `layer1`..., global average pool, `fc`.

    (N, channels, H, W) -> logits (N, classes), any H and W. `depths` are blocks a stage; stage i has
    `planes * 2**i * expansion` channels times `width`, and every stage but the first halves the map.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        planes: int,
        shortcut: Shortcut,
        classes: int,
        *,
        channels: int = 3,
        width: float = 1.0,
        resolution: float = 1.0,
        block: Block = BasicBlock,
        first_block: Block | None = None,
        expansion: int = 1,
    ) -> None:
        super().__init__()
        c_in = scale_channels(planes, width)
        self.conv1 = conv3x3(channels, c_in, STEM_STRIDE[resolution])
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu = nn.ReLU()
        # Stages are direct children, so that paths read `layer1.0.relu1` as in torchvision.
        self.stage_names = tuple(f"layer{i + 1}" for i in range(len(depths)))
        for i, (name, depth) in enumerate(zip(self.stage_names, depths, strict=True)):
            c_out = scale_channels(planes * 2**i * expansion, width)
            first = block if first_block is None or i > 0 else first_block
            head = first(c_in, c_out, 1 if i == 0 else 2, shortcut)
            tail = [block(c_out, c_out, 1, shortcut) for _ in range(depth - 1)]
            self.add_module(name, nn.Sequential(head, *tail))
            c_in = c_out
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c_in, classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        return self.fc(self.avgpool(x).flatten(1))


def cifar_resnet(depth: int, shortcut: Shortcut = PadShortcut) -> Callable[..., ResNet]:
    """Builder of the three-stage 16-32-64 net of `depth` = 6n + 2 layers (He et al., section 4.2)."""
    return partial(ResNet, (depth // 6,) * 3, 16, shortcut)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet9": partial(ResNet, (1, 1, 1, 1), 64, projection_shortcut, first_block=SingleConvBlock),
    "resnet10": partial(ResNet, (1, 1, 1, 1), 64, projection_shortcut),
    "resnet18": partial(ResNet, (2, 2, 2, 2), 64, projection_shortcut),
    "resnet34": partial(ResNet, (3, 4, 6, 3), 64, projection_shortcut),
}
BUILDERS |= {f"resnet{depth}": cifar_resnet(depth) for depth in (20, 32, 44, 56, 110)}
# The form that the public code of online distillation (ONE, FFL) has.
BUILDERS |= {f"resnet{depth}-projection": cifar_resnet(depth, projection_shortcut) for depth in (32, 110)}
