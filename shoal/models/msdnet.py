"""MSDNet, multi-scale dense networks with a classifier after every block (Huang et al., ICLR'18), for small images.

| name     | blocks          | layers per block     | parameters (100 classes) | MACs at 3x32x32 |
|----------|-----------------|----------------------|--------------------------|-----------------|
| msdnet-7 | seven, even     | 4, 2, 2, 2, 2, 2, 2  | 3,067,960                | 75.49 M         |
| msdnet-5 | five, growing   | 1, 2, 3, 4, 5        | 2,078,924                | 58.09 M         |

Widths, bottlenecks and reductions are the CIFAR settings of github.com/kalviny/MSDNet-PyTorch. There are three scales.
The finest has 16 channels after the first layer and 6 more after each further layer, the coarser ones twice and four
times as many. After a third of the layers the finest scale ends, after two thirds the next one; each time the number
of channels is halved.

The order in a layer is conv-BN-ReLU. Images may have any size: every stride rounds up, so the scales have matching
sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from shoal.models.blocks import STEM_STRIDE, init_weights, scale_channels

CHANNELS, GROWTH, HEAD = 16, 6, 128
"""Channels of the finest scale after the first layer, channels that each layer adds to it, channels of a classifier."""

FACTORS = (1, 2, 4)
"""Factor of the channels of each scale, fine to coarse; also the factor of its bottlenecks."""


class Unit(nn.Sequential):
    """CONV-BN-ReLU: [N, c_in, H, W] -> [N, c_out, ceil(H/stride), ceil(W/stride)]."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()


def bottleneck(c_in: int, c_out: int, factor: int, stride: int = 1) -> nn.Sequential:
    """A 1x1 unit to `factor` * `c_out` channels, but at most `c_in`, then a 3x3 unit with the stride.

    [N, c_in, H, W] -> [N, c_out, ceil(H/stride), ceil(W/stride)].
    """
    inner = min(c_in, factor * c_out)
    return nn.Sequential(Unit(c_in, inner, kernel=1), Unit(inner, c_out, stride=stride))


class Dense(nn.Module):
    """The part of a layer at one scale: adds channels computed from this scale and, if there is one, the finer scale.

    `same` computes those from this scale, `down` those from the finer one.
    """

    def __init__(self, finer: int | None, channels: int, added: int, scale: int) -> None:
        super().__init__()
        factor = FACTORS[scale]
        self.down: nn.Sequential | None = None
        if finer is not None:
            added //= 2
            self.down = bottleneck(finer, added, FACTORS[scale - 1], stride=2)
        self.same = bottleneck(channels, added, factor)

    def forward(self, finer: Tensor | None, x: Tensor) -> Tensor:
        """[N, c, H, W] and, from the finer scale, [N, c', 2H, 2W] (or one less) -> [N, c + added, H, W]."""
        if self.down is None or finer is None:
            return torch.cat([x, self.same(x)], 1)
        return torch.cat([x, self.down(finer), self.same(x)], 1)


class First(nn.Module):
    """The first layer: computes a map of each scale, each from the one before with stride 2."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        counts = [channels, *(width * factor for factor in FACTORS)]
        strides = (stride, *[2] * (len(FACTORS) - 1))
        self.scales = nn.ModuleList(Unit(a, b, stride=s) for a, b, s in zip(counts, counts[1:], strides, strict=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, channels, H, W] -> a map of each scale, fine to coarse; each half as high and wide as the last."""
        maps: list[Tensor] = []
        for scale in self.scales:
            x = scale(x)
            maps.append(x)
        return maps


class Layer(nn.Module):
    """One layer over the remaining scales. It reads `before` scales and returns the `after` coarsest of them.

    A scale with factor f (see `FACTORS`) has `width` * f channels before the layer and (`width` + `growth`) * f after.
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
        """Maps of the scales before the layer -> maps of the scales after it, fine to coarse."""
        finer = [None, *maps][self.dropped :]
        return [scale(a, b) for scale, a, b in zip(self.scales, finer, maps[self.dropped :], strict=False)]


class Transition(nn.Module):
    """1x1 units that reduce the channels of every scale, from `before` to `after` times the scale's factor."""

    def __init__(self, before: int, after: int, scales: int) -> None:
        super().__init__()
        factors = FACTORS[len(FACTORS) - scales :]
        self.scales = nn.ModuleList(Unit(before * factor, after * factor, kernel=1) for factor in factors)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps of the scales, fine to coarse, with the reduced number of channels."""
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
    """Blocks of layers with a classifier after each; `steps` is the number of layers in each block.

    (N, channels, H, W) -> a tuple of logits (N, classes), one per classifier, weakest first.
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
    """For each layer: its modules (with a transition if a scale ends there), and the channels for factor 1 after it."""
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
