"""Networks with residual sums, see `architectures`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inside: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 (in `groups`), 1x1."""

    expansion = 2

    def __init__(self, inside: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, groups=self.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.downsample = downsample

    groups = 1

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class GroupedBottleneck(Bottleneck):
    groups = 4


class ResNet(nn.Module):
    """He et al. 2016, with `downsample` as an optional module and layers by `_make_layer`."""

    block: Any = BasicBlock
    layout = (1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.inplanes = 8
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(8, self.layout[0])
        self.layer2 = self._make_layer(16, self.layout[1], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(16 * self.block.expansion, CLASSES)

    def _make_layer(self, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        downsample = None
        if stride != 1 or self.inplanes != planes * self.block.expansion:
            conv = nn.Conv2d(self.inplanes, planes * self.block.expansion, 1, stride, bias=False)
            downsample = nn.Sequential(conv, nn.BatchNorm2d(planes * self.block.expansion))
        layers = [self.block(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes * self.block.expansion
        layers += [self.block(self.inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class BottleneckResNet(ResNet):
    block = Bottleneck


class ResNeXt(ResNet):
    """Xie et al. 2017: grouped bottlenecks."""

    block = GroupedBottleneck


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each convolution; the shortcut branches off after the first ReLU."""

    def __init__(self, inside: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        if stride != 1 or inside != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, planes, kernel_size=1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class PreActResNet(nn.Module):
    """He et al. 2016b."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1, bias=False)
        self.layers = nn.ModuleList([PreActBlock(8, 8), PreActBlock(8, 12, 2), PreActBlock(12, 12)])
        self.linear = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for layer in self.layers:
            out = layer(out)
        out = F.avg_pool2d(out, 8)
        return self.linear(out.view(out.size(0), -1))


class WideBlock(nn.Module):
    def __init__(self, inside: int, planes: int, stride: int, rate: float) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(inside), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inside, planes, 3, stride, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(planes), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.rate, self.equal = rate, inside == planes
        self.convShortcut = nn.Conv2d(inside, planes, 1, stride, bias=False) if not self.equal else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.equal:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equal else x)))
        if self.rate > 0:
            out = F.dropout(out, p=self.rate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.equal else self.convShortcut(x), out)  # type: ignore[misc]


class WideResNet(nn.Module):
    """Zagoruyko & Komodakis 2016, with dropout inside the blocks and a ReLU before the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.block1 = nn.Sequential(WideBlock(8, 12, 1, 0.3), WideBlock(12, 12, 1, 0.3))
        self.block2 = nn.Sequential(WideBlock(12, 16, 2, 0.3))
        self.bn1, self.relu = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.fc, self.channels = nn.Linear(16, CLASSES), 16

    def forward(self, x: Tensor) -> Tensor:
        out = self.block2(self.block1(self.conv1(x)))
        out = F.avg_pool2d(self.relu(self.bn1(out)), 8)
        return self.fc(out.view(-1, self.channels))


class Root(nn.Module):
    """Joins the branches of a tree."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 1, bias=False)
        self.bn = nn.BatchNorm2d(outside)

    def forward(self, xs: list[Tensor]) -> Tensor:
        return F.relu(self.bn(self.conv(torch.cat(xs, 1))))


class Tree(nn.Module):
    def __init__(self, inside: int, outside: int, level: int, stride: int = 1) -> None:
        super().__init__()
        self.root = Root(2 * outside, outside)
        make = PostActBlock if level == 1 else lambda i, o, s: Tree(i, o, level - 1, s)
        self.left, self.right = make(inside, outside, stride), make(outside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        out1 = self.left(x)
        return self.root([out1, self.right(out1)])


class PostActBlock(nn.Module):
    def __init__(self, inside: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, planes, 3, stride, 1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            nn.Conv2d(planes, planes, 3, 1, 1, bias=False),
            nn.BatchNorm2d(planes),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


class SimpleDLA(nn.Module):
    """Yu et al. 2018: trees of residual blocks, aggregated by 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
        self.layer3 = Tree(8, 8, level=1)
        self.layer4 = Tree(8, 12, level=2, stride=2)
        self.linear = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layer4(self.layer3(self.base(x))).mean(3).mean(2))


NETWORKS: tuple[type[nn.Module], ...] = (
    ResNet,
    BottleneckResNet,
    ResNeXt,
    PreActResNet,
    WideResNet,
    SimpleDLA,
)
