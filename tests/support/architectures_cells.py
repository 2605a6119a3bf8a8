"""Networks of dense, shuffled, inverted, gated and recurrent cells, see `architectures`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


class DenseLayer(nn.Module):
    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inside), nn.Conv2d(inside, 4 * growth, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], 1)


class DenseNet(nn.Module):
    """Huang et al. 2017: each layer's result is put beside what it read; transitions halve width and size."""

    def __init__(self, growth: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1, bias=False)
        self.dense1 = nn.Sequential(*[DenseLayer(8 + i * growth, growth) for i in range(3)])
        self.bn1, self.trans1 = nn.BatchNorm2d(20), nn.Conv2d(20, 10, kernel_size=1, bias=False)
        self.dense2 = nn.Sequential(*[DenseLayer(10 + i * growth, growth) for i in range(2)])
        self.bn = nn.BatchNorm2d(18)
        self.linear = nn.Linear(18, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.dense1(self.conv1(x))
        out = F.avg_pool2d(self.trans1(F.relu(self.bn1(out))), 2)
        out = F.relu(self.bn(self.dense2(out)))
        out = F.adaptive_avg_pool2d(out, 1).reshape(x.shape[0], -1)
        return self.linear(out)


class ShuffleUnit(nn.Module):
    """Zhang et al. 2018: half of the channels go through, then both halves are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(x2)))
        out = torch.cat((x1, F.relu(self.bn2(self.conv2(out)))), dim=1)
        n, c, h, w = out.size()
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stage2 = nn.Sequential(ShuffleUnit(16), ShuffleUnit(16))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.maxpool(self.conv1(x)))
        return self.fc(x.mean([2, 3]))


def divisible(value: float, by: int = 4) -> int:
    return max(by, int(value + by / 2) // by * by)


class InvertedResidual(nn.Module):
    """Sandler et al. 2018: expand, filter each channel, project without an activation."""

    def __init__(self, inside: int, outside: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inside * expand
        self.use_res_connect = stride == 1 and inside == outside
        self.conv = nn.Sequential(
            nn.Conv2d(inside, hidden, 1, 1, 0, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outside, 1, 1, 0, bias=False),
            nn.BatchNorm2d(outside),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = divisible(8.5)
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(inplace=True),
            InvertedResidual(width, 8, 1, 2),
            InvertedResidual(8, 12, 2, 3),
            InvertedResidual(12, 12, 1, 3),
        )
        self.classifier = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.mean(3).mean(2)
        return self.classifier(x)


class Excitation(nn.Module):
    """Hu et al. 2018: each channel times a gate that its mean decides."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.se1 = nn.Conv2d(channels, squeezed, kernel_size=1)
        self.se2 = nn.Conv2d(squeezed, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        w = F.relu(self.se1(F.adaptive_avg_pool2d(x, (1, 1))))
        return x * torch.sigmoid(self.se2(w))


class RegBlock(nn.Module):
    """Radosavovic et al. 2020: a grouped bottleneck; `gated` makes X a Y block."""

    def __init__(self, inside: int, outside: int, stride: int, gated: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, stride, 1, groups=outside // 4, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.se = Excitation(outside, 4) if gated else None
        self.conv3, self.bn3 = nn.Conv2d(outside, outside, 1, bias=False), nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = out if self.se is None else self.se(out)
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return torch.relu(out)


class RegNetX(nn.Module):
    gated = False

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        blocks = [RegBlock(8, 12, 2, self.gated), RegBlock(12, 12, 1, self.gated)]
        self.trunk = nn.ModuleDict({f"block{i}": block for i, block in enumerate(blocks)})
        self.head = nn.ModuleList([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in (*self.trunk.values(), *self.head):
            x = part(x)
        return x


class RegNetY(RegNetX):
    gated = True


class MBConv(nn.Module):
    """Tan & Le 2019: inverted residual with squeeze-excite and SiLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 2 * channels
        self.expand = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU())
        self.depth = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False)
        self.bn, self.se = nn.BatchNorm2d(hidden), Excitation(hidden, 4)
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.se(F.silu(self.bn(self.depth(self.expand(x))))))


class EfficientNet(nn.Sequential):
    def __init__(self) -> None:
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU(inplace=True))
        super().__init__(stem, MBConv(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, CLASSES))


class Recurrent(nn.Module):
    """One convolution, one batch norm and one ReLU called again and again (Liang & Hu 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.act, self.drop = nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1)
        self.out = nn.Linear(8 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        begun = self.act(self.first(x))
        state = begun
        for _ in range(3):
            state = self.act(self.norm(self.again(state)) + begun)
        pooled = self.act(self.drop(F.avg_pool2d(state, 4)) - 0.1)
        return self.out(pooled.flatten(start_dim=1))


class FixupBlock(nn.Module):
    """Zhang et al. 2019: scalar shifts and one scale instead of batch norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bias1a, self.bias1b, self.bias2a, self.bias2b = (
            nn.Parameter(torch.full((1,), float(b))) for b in (0.1, 0, -0.2, 0.3)
        )
        self.scale = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x + self.bias1a) + self.bias1b, inplace=True)
        out = self.conv2(out + self.bias2a) * self.scale + self.bias2b
        return F.relu(x + out)


class FixupNet(nn.Module):
    """Images are standardised inside, the blocks have scalars, and a batch norm stands between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, -0.1, 0.2]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1))
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(FixupBlock(8), FixupBlock(8))
        self.hidden, self.norm, self.last = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        x = self.blocks(F.relu(self.stem(x))) / math.sqrt(2)
        x = F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]
        return self.last(F.relu(self.norm(self.hidden(x))))


NETWORKS: tuple[type[nn.Module], ...] = (
    DenseNet,
    ShuffleNet,
    MobileNetV2,
    RegNetX,
    RegNetY,
    EfficientNet,
    Recurrent,
    FixupNet,
)
