"""MSDNet, multi-scale dense networks with a classifier after every block (Huang et al., ICLR'18), for small images.

| name     | blocks          | layers of each block | parameters (100 classes) | MACs at 3x32x32 |
|----------|-----------------|----------------------|--------------------------|-----------------|
| msdnet-7 | seven, even     | 4, 2, 2, 2, 2, 2, 2  | 3,067,960                | 75.49 M         |
| msdnet-5 | five, growing   | 1, 2, 3, 4, 5        | 2,078,924                | 58.09 M         |

Widths, bottlenecks and reductions are those of github.com/kalviny/MSDNet-PyTorch's settings for CIFAR: three scales, 16
channels at first and 6 more a layer at the finest scale, twice and four times as many at the coarser ones. A third of
the way down the finest scale ends, at two thirds the next, each time with half of the channels.

A layer is conv-BN-ReLU in order. Any image size will do: every stride rounds up, so that the scales stay in step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from shoal.models.blocks import STEM_STRIDE, init_weights, scale_channels

CHANNELS, GROWTH, HEAD = 16, 6, 128
"""Channels of the finest scale after the first layer, channels that each layer adds to it, and a classifier's."""

FACTORS = (1, 2, 4)
"""Channels of each scale, fine to coarse, in those of the finest; bottlenecks grow likewise."""


class Unit(nn.Sequential):
    """CONV-BN-ReLU: [N, c_in, H, W] -> [N, c_out, ceil(H/stride), ceil(W/stride)]."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()


def bottleneck(c_in: int, c_out: int, factor: int, stride: int = 1) -> nn.Sequential:
    """A 1x1 unit to at most `factor` times the `c_out` channels, then a 3x3 unit."""
    inner = min(c_in, factor * c_out)
    return nn.Sequential(Unit(c_in, inner, kernel=1), Unit(inner, c_out, stride=stride))


class Dense(nn.Module):
    """What one layer adds to one scale: `same` from this scale and, if there is a finer one, `down` from that one."""

    def __init__(self, finer: int | None, channels: int, added: int, scale: int) -> None:
        super().__init__()
        factor = FACTORS[scale]
        self.down: nn.Sequential | None = None
        if finer is not None:
            added //= 2
            self.down = bottleneck(finer, added, FACTORS[scale - 1], stride=2)
        self.same = bottleneck(channels, added, factor)

    def forward(self, finer: Tensor | None, x: Tensor) -> Tensor:
        """[N, c, H, W], and [N, c', 2H, 2W] of the finer scale, to [N, c + added, H, W]."""
        if self.down is None or finer is None:
            return torch.cat([x, self.same(x)], 1)
        return torch.cat([x, self.down(finer), self.same(x)], 1)


class First(nn.Module):
    """Images to all scales, each made of the one before by a stride of 2."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        counts = [channels, *(width * factor for factor in FACTORS)]
        strides = (stride, *[2] * (len(FACTORS) - 1))
        self.scales = nn.ModuleList(Unit(a, b, stride=s) for a, b, s in zip(counts, counts[1:], strides, strict=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, channels, H, W] to a map of each scale, fine to coarse."""
        maps: list[Tensor] = []
        for scale in self.scales:
            x = scale(x)
            maps.append(x)
        return maps


class Layer(nn.Module):
    """One layer over the scales that are left: `width` channels of the finest scale in, `width + growth` out.

    It reads `before` scales and gives the `after` coarsest of them.
    """

    def __init__(self, width: int, growth: int, before: int, after: int) -> None:
        super().__init__()
        scales = range(len(FACTORS) - after, len(FACTORS))
        counts = [width * factor for factor in FACTORS]
        finest = len(FACTORS) - before
        self.dropped = before - after
        self.scales = nn.ModuleList(
            Dense(counts[s - 1] if s > finest else None, counts[s], growth * FACTORS[s], s) for s in scales
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """A map of each scale, fine to coarse."""
        finer = [None, *maps][self.dropped :]
        return [scale(a, b) for scale, a, b in zip(self.scales, finer, maps[self.dropped :], strict=False)]


class Transition(nn.Module):
    """1x1 units that bring every scale to fewer channels."""

    def __init__(self, before: int, after: int, scales: int) -> None:
        super().__init__()
        factors = FACTORS[len(FACTORS) - scales :]
        self.scales = nn.ModuleList(Unit(before * factor, after * factor, kernel=1) for factor in factors)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The maps with other channels."""
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]


class Classifier(nn.Module):
    """Two 3x3 units with stride 2, global average pool, linear: [N, c, H, W] -> logits [N, classes]."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.units = nn.Sequential(Unit(channels, width, stride=2), Unit(width, width, stride=2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.units(x)).flatten(1))


class MSDNet(nn.Module):
    """`blocks` of layers and their `classifiers`: (N, channels, H, W) -> logits (N, classes) of each, weak to strong.

    `steps` are the layers of each block.
    """

    def __init__(
        self, steps: Sequence[int], classes: int, *, channels: int = 3, width: float = 1.0, resolution: float = 1.0
    ) -> None:
        super().__init__()
        growth, head = scale_channels(GROWTH, width), scale_channels(HEAD, width)
        layers = _layers(scale_channels(CHANNELS, width), growth, sum(steps))
        blocks, classifiers = [], []
        for step in steps:
            block: list[nn.Module] = []
            for _ in range(step):
                made, count = next(layers)
                block.extend(made)
            blocks.append(nn.Sequential(*block))
            classifiers.append(Classifier(count * FACTORS[-1], head, classes))
        self.first = First(channels, scale_channels(CHANNELS, width), STEM_STRIDE[resolution])
        self.blocks, self.classifiers = nn.ModuleList(blocks), nn.ModuleList(classifiers)
        init_weights(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps, logits = self.first(x), []
        for block, classifier in zip(self.blocks, self.classifiers, strict=True):
            maps = block(maps)
            logits.append(classifier(maps[-1]))
        return tuple(logits)


def _layers(width: int, growth: int, total: int) -> Iterator[tuple[list[nn.Module], int]]:
    """Each layer, with a transition where a scale ends, and the finest scale's channels after it."""
    interval = -(-total // len(FACTORS))
    before = len(FACTORS)
    for index in range(total):
        after = len(FACTORS) - index // interval
        made: list[nn.Module] = [Layer(width, growth, before, after)]
        width += growth
        if after < before:
            made.append(Transition(width, width // 2, after))
            width //= 2
        yield made, width
        before = after


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "msdnet-7": partial(MSDNet, (4, 2, 2, 2, 2, 2, 2)),
    "msdnet-5": partial(MSDNet, (1, 2, 3, 4, 5)),
}
