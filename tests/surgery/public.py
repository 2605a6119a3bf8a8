"""Blocks of public CIFAR networks with what is particular in their code; `families.FAMILIES` makes networks of them.

The layouts follow the papers and the usual repositories; the code is written for these tests, with few channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE, CLASSES = (3, 16, 16), 5


def conv_bn(inside: int, outside: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outside))


def conv_relu(*given: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(*conv_bn(*given), act())


class Classified(nn.Module):
    """`body` and a classifier of its 8 channels."""

    def __init__(self, body: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.body, self.linear = body, nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out = F.avg_pool2d(out, out.size(3))
        out = out.view(out.size(0), -1)
        return self.linear(out)


class Call(nn.Module):
    """Layers by name, and a forward pass of them."""

    def __init__(self, call: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def after_stem(*blocks: nn.Module, channels: int = 8) -> nn.Module:
    return Classified(nn.Sequential(conv_relu(3, 8), *blocks), channels)


class OptionA(nn.Module):
    """He et al.'s CIFAR shortcut without weights: rows and columns left out, channels of zeros added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.shortcut = Call(lambda m, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def padded_with_zeros(m: Any, x: Tensor) -> Tensor:
    """A pyramid's block: more channels by a tensor of zeros that forward makes."""
    out, shortcut = m.conv(x), F.avg_pool2d(x, 2)
    zeros = torch.zeros_like(shortcut)
    return out + torch.cat((shortcut, zeros), 1)


class DualPath(nn.Module):
    """DPN: some channels are added to, the others are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shortcut, self.added = conv_bn(8, 10), conv_bn(8, 10, 1), 6

    def forward(self, x: Tensor) -> Tensor:
        x, out, d = self.shortcut(x), self.conv(x), self.added
        out = torch.cat([x[:, :d, :, :] + out[:, :d, :, :], x[:, d:, :, :], out[:, d:, :, :]], 1)
        return F.relu(out)


class ShuffledSplit(nn.Module):
    """ShuffleNetV2: half of the channels pass, the other half is convolved, and all are mixed."""

    def __init__(self, ratio: float = 0.5) -> None:
        super().__init__()
        self.ratio, self.branch = ratio, nn.Sequential(conv_relu(4, 4, 1), conv_bn(4, 4, 3, 1, 4), conv_relu(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        c = int(x.size(1) * self.ratio)
        x1, x2 = x[:, :c, :, :], x[:, c:, :, :]
        out = torch.cat([x1, self.branch(x2)], 1)
        n, c, h, w = out.size()
        return out.view(n, 2, c // 2, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


class Cell(nn.Module):
    """PNASNet and NASNet: sums of separable convolutions and pools with a stride, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(conv_bn(8, 8, k, 2, 8), conv_bn(8, 8, 1)) for k in (3, 5))
        self.fit = conv_bn(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.left(x) + self.right(x))
        b = F.relu(self.fit(F.max_pool2d(x, kernel_size=3, stride=2, padding=1)) + self.left(x))
        return torch.cat([a, b], 1)


def cells(m: Any, x: Tensor) -> Tensor:
    """NASNet: every cell reads the results of the two before it."""
    before, now = x, m.first(x)
    for cell in m.cells:
        before, now = now, cell(before) + F.avg_pool2d(now, 3, stride=1, padding=1)
    return now


class Excitation(nn.Module):
    def __init__(self, gate: Callable[[], nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.fc1, self.fc2, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        w = F.avg_pool2d(x, x.size(2))
        return x * self.gate(self.fc2(F.relu(self.fc1(w))))


class FlatExcitation(nn.Module):
    """Squeeze-excite with linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(8, 4), nn.ReLU(inplace=True), nn.Linear(4, 8), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        return x * self.fc(y).view(b, c, 1, 1).expand_as(x)


def attended(m: Any, x: Tensor) -> Tensor:
    """Residual attention: a mask from a smaller image."""
    small = m.mask(F.max_pool2d(x, 3, 2, 1))
    mask = torch.sigmoid(F.interpolate(small, size=x.size()[2:], mode="bilinear", align_corners=True))
    return (1 + mask) * m.trunk(x)


class StochasticDepth(nn.Module):
    """A block that is left out at random in training, and scaled in inference."""

    def __init__(self, survival: float = 0.8) -> None:
        super().__init__()
        self.survival, self.residual, self.shortcut = survival, conv_bn(8, 8), nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if torch.equal(torch.bernoulli(torch.tensor([self.survival])), torch.ones(1)):
                return F.relu(self.residual(x) + self.shortcut(x))
            return self.shortcut(x)
        return F.relu(self.residual(x) * self.survival + self.shortcut(x))


class DropPath(nn.Module):
    def __init__(self, drop: float = 0.1) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if self.drop == 0.0 or not self.training:
            return x
        keep = 1 - self.drop
        return x.div(keep) * torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device).bernoulli_(keep)


class Separable(nn.Sequential):
    """Xception: the ReLU first, not in place, since the shortcut reads its input."""

    def __init__(self) -> None:
        parts = [nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)]
        super().__init__(nn.ReLU(inplace=False), *parts, nn.MaxPool2d(3, 2, 1))


class ManyBranches(nn.Module):
    """RepVGG and MobileOne in training: branches that could be one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.rbr_dense, self.rbr_1x1, self.rbr_identity = conv_bn(8, 8), conv_bn(8, 8, 1), nn.BatchNorm2d(8)
        self.nonlinearity, self.se = nn.ReLU(), nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.se(self.rbr_reparam(inputs)))
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.nonlinearity(self.se(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out))


class Fractal(nn.Module):
    """FractalNet: two paths whose mean is taken; paths are dropped in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList([conv_relu(8, 8), nn.Sequential(conv_relu(8, 8), conv_relu(8, 8))])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([path(x) for path in self.paths]).mean(dim=0)


class Harmonic(nn.Module):
    """HarDNet: layer i reads the layers that differ from it by a power of two."""

    def __init__(self) -> None:
        super().__init__()
        self.links = [[i - 2**j for j in range(i) if i % 2**j == 0] for i in range(1, 5)]
        self.layers = nn.ModuleList([conv_relu(8 * len(link), 8) for link in self.links])

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for link, layer in zip(self.links, self.layers, strict=True):
            read = [found[i] for i in link]
            found.append(layer(torch.cat(read, 1) if len(read) > 1 else read[0]))
        return torch.cat([f for i, f in enumerate(found) if i % 2 == 1 or i == len(found) - 1], 1)


class Ghost(nn.Module):
    """GhostNet: cheap channels from few, and no more than asked for."""

    def __init__(self, outside: int = 7) -> None:
        super().__init__()
        self.outside, few = outside, math.ceil(outside / 2)
        self.primary, self.cheap = conv_relu(8, few, 1), conv_relu(few, few, 3, 1, few)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary(x)
        return torch.cat([x1, self.cheap(x1)], dim=1)[:, : self.outside, :, :]


class Scales(nn.Module):
    """Res2Net: groups of channels, each reads the result of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([conv_relu(2, 2) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, 2, 1)
        out = now = self.convs[0](parts[0])
        for i, conv in enumerate(list(self.convs)[1:], start=1):
            now = conv(now + parts[i])
            out = torch.cat((out, now), 1)
        return torch.cat((out, parts[3]), 1)


class Residual(nn.Module):
    """ConvMixer: any function and its argument."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def mixer(act: Callable[[], nn.Module]) -> nn.Module:
    depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, padding="same"), act(), nn.BatchNorm2d(8))
    block = nn.Sequential(Residual(depthwise), nn.Conv2d(8, 8, 1), act(), nn.BatchNorm2d(8))
    head = [nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(8, CLASSES)]
    return nn.Sequential(nn.Conv2d(3, 8, 2, 2), act(), nn.BatchNorm2d(8), block, *head)


def shortcut_d(**options: Any) -> nn.Module:
    """ResNet-D: the shortcut averages before its 1x1 convolution."""
    path = nn.Sequential(nn.AvgPool2d(2, 2, **options), conv_bn(8, 8, 1))
    return Call(lambda m, x: F.relu(m.conv(x) + m.path(x)), conv=conv_bn(8, 8, 3, 2), path=path)


class Standardised(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1 (NFNet, BiT)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Samepadded(nn.Conv2d):
    """A convolution with TensorFlow's padding, which depends on the size and may differ between sides."""

    def forward(self, x: Tensor) -> Tensor:
        ih, iw = x.size()[-2:]
        kh, kw = self.weight.size()[-2:]
        pad_h = max((math.ceil(ih / self.stride[0]) - 1) * self.stride[0] + kh - ih, 0)
        pad_w = max((math.ceil(iw / self.stride[1]) - 1) * self.stride[1] + kw - iw, 0)
        if pad_h > 0 or pad_w > 0:
            x = F.pad(x, [pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Dense(nn.Module):
    """DenseNet as torchvision has it: a list of features, or one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.drop_rate = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False), 0.1

    def forward(self, given: Any) -> Tensor:
        found = [given] if isinstance(given, Tensor) else given
        new = self.conv(F.relu(self.norm(torch.cat(found, 1))))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return torch.cat([*found, new], 1)


class Resolutions(nn.Module):
    """HRNet: two resolutions, the smaller one enlarged."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.high, self.low, self.mode = conv_relu(8, 8), conv_relu(8, 8, 3, 2), mode

    def forward(self, x: Tensor) -> Tensor:
        low = F.interpolate(self.low(x), scale_factor=2, mode=self.mode)
        return F.relu(self.high(x) + low)


class ChannelsLast(nn.Module):
    """ConvNeXt: a layer norm over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
