"""Networks without residual sums, as people write them for CIFAR, small; `ARCHITECTURES` lists these and the others.

Layer layouts follow the papers; the code is written for these tests, each network in another of the usual styles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import architectures_cells as cells
from tests.support import architectures_residual as residual

SHAPE, CLASSES = (3, 32, 32), 5


class LeNet(nn.Module):
    """LeCun et al. 1998, with the functional calls of PyTorch's first tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 60)
        self.fc2 = nn.Linear(60, 42)
        self.fc3 = nn.Linear(42, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x))
        out = F.max_pool2d(out, 2)
        out = F.relu(self.conv2(out))
        out = F.max_pool2d(out, 2)
        out = out.view(out.size(0), -1)
        out = F.relu(self.fc1(out))
        out = F.relu(self.fc2(out))
        return self.fc3(out)


class AlexNet(nn.Module):
    """Krizhevsky et al. 2012 for small images: features and classifier, overlapping pools, dropout, in-place ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, kernel_size=5, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(8, 12, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 8, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((3, 3))
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(8 * 9, 40), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(40, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        x = torch.flatten(x, 1)
        return self.classifier(x)


class VGG(nn.Module):
    """Simonyan & Zisserman 2015, from a list of widths and "M"."""

    def __init__(self, layout: tuple[int | str, ...] = (8, "M", 16, "M", 16, 16, "M", 24, 24, "M", "M")) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in layout:
            if isinstance(width, str):
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers, nn.AvgPool2d(kernel_size=1, stride=1))
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        return self.classifier(out.view(len(out), -1))


def network_in_network() -> nn.Module:
    """Lin et al. 2014: nothing but a Sequential, and a convolution as its classifier."""

    def mlp(inside: int, *outside: int, kernel: int = 5) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for i, width in enumerate(outside):
            k = kernel if i == 0 else 1
            layers += [nn.Conv2d(inside, width, k, padding=k // 2), nn.ReLU(inplace=True)]
            inside = width
        return layers

    return nn.Sequential(
        *mlp(3, 12, 10, 8),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Dropout(0.5),
        nn.Sequential(*mlp(8, 12, 12)),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.Dropout2d(0.5),
        *mlp(12, 12, CLASSES, kernel=3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Fire(nn.Module):
    """A squeezing 1x1 convolution, then 1x1 and 3x3 ones side by side."""

    def __init__(self, inside: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inside, squeezed, kernel_size=1)
        self.activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, kernel_size=1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.squeeze(x))
        return torch.cat([self.activation(self.expand1x1(x)), self.activation(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """Iandola et al. 2016: fire modules, max pools with ceil_mode, a convolution and a global pool at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, kernel_size=3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(8, 4, 8),
            Fire(16, 4, 8),
            nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
            Fire(16, 6, 10),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(p=0.5),
            nn.Conv2d(20, CLASSES, kernel_size=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d((1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).squeeze(3).squeeze(2)


class Inception(nn.Module):
    """Four branches side by side: 1x1; 1x1 and 3x3; 1x1 and two 3x3; a 3x3 max pool and 1x1."""

    def __init__(self, inside: int, b1: int, b2: tuple[int, int], b3: tuple[int, int], b4: int) -> None:
        super().__init__()
        self.b1 = self.unit(inside, b1, 1)
        self.b2 = nn.Sequential(self.unit(inside, b2[0], 1), self.unit(b2[0], b2[1], 3))
        self.b3 = nn.Sequential(self.unit(inside, b3[0], 1), self.unit(b3[0], b3[1], 3), self.unit(b3[1], b3[1], 3))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), self.unit(inside, b4, 1))

    @staticmethod
    def unit(inside: int, outside: int, kernel: int) -> nn.Sequential:
        conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2)
        return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU(True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in (self.b1, self.b2, self.b3, self.b4)], dim=1)


class GoogLeNet(nn.Module):
    """Szegedy et al. 2015, two cells at each of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_layers = Inception.unit(3, 8, 3)
        self.a3 = Inception(8, 4, (4, 6), (2, 4), 2)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.a4 = Inception(16, 4, (4, 8), (2, 4), 4)
        self.b4 = Inception(20, 6, (4, 8), (2, 4), 4)
        self.avgpool = nn.AvgPool2d(8, stride=1)
        self.linear = nn.Linear(22, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.maxpool(self.a3(self.pre_layers(x)))
        out = self.b4(self.a4(self.maxpool(out)))
        out = self.avgpool(out)
        return self.linear(out.view(out.size(0), -1))


class MobileNet(nn.Module):
    """Howard et al. 2017: depthwise and pointwise convolutions from a list of (width, stride)."""

    cfg = (12, (16, 2), 16, (24, 2))

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layers = self._make_layers(8)
        self.linear = nn.Linear(24, CLASSES)

    def _make_layers(self, inside: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for entry in self.cfg:
            width, stride = entry if isinstance(entry, tuple) else (entry, 1)
            layers += [nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False), nn.BatchNorm2d(inside)]
            layers += [nn.ReLU(), nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inside = width
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.shape[0], -1))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "LeNet": LeNet,
    "AlexNet": AlexNet,
    "VGG": VGG,
    "NiN": network_in_network,
    "SqueezeNet": SqueezeNet,
    "GoogLeNet": GoogLeNet,
    "MobileNet": MobileNet,
    **{kind.__name__: kind for kind in residual.NETWORKS},
    **{kind.__name__: kind for kind in cells.NETWORKS},
}
