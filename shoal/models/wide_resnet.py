"""Wide ResNets with pre-activation blocks (Zagoruyko & Komodakis, BMVC'16, arXiv:1605.07146), no dropout.

`wrn-d-k`: depth d = 6n + 4, three stages of n blocks with 16k, 32k, 64k channels behind a 16-channel stem.
No ReLU follows the stem directly: the first one is `layer1.0.relu1`, on 16 channels. The last one is `relu`, before the
pool. Papers differ in the last one: SENet and RLNet count it, and SNL's network does not have it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from shoal.models.blocks import STEM_STRIDE, conv3x3, init_weights, scale_channels


class WideBlock(nn.Module):
    """BN-relu1-conv-BN-relu2-conv, plus the shortcut.

    (N, c_in, H, W) -> (N, c_out, ceil(H/stride), ceil(W/stride)). If the shape stays the same, the shortcut is the
    identity of x; otherwise it is a 1x1 convolution of relu1's result, as in the authors' code.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(c_out, c_out)
        self.projects = stride != 1 or c_in != c_out
        # No BatchNorm here, since the next block normalises the sum.
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False) if self.projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        # `projects` is a constant of the block, so tracing can follow this branch.
        skip = self.shortcut(active if self.projects else x)
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + skip


def wide_stage(c_in: int, c_out: int, stride: int, depth: int) -> nn.Sequential:
    """`depth` blocks, of which the first has the stride and changes the channels; shapes as in `WideBlock`."""
    tail = [WideBlock(c_out, c_out, 1) for _ in range(depth - 1)]
    return nn.Sequential(WideBlock(c_in, c_out, stride), *tail)


class WideResNet(nn.Module):
    """Stem conv, `layer1`-`layer3`, then `bn`, `relu`, global average pool and `fc`.

    (N, channels, H, W) -> logits (N, classes), any H and W. `width` multiplies every channel count, also the stem's, in
    addition to the widening factor `k`; `resolution` sets the stride of the stem.
    """

    def __init__(
        self,
        depth: int,
        k: int,
        classes: int,
        *,
        channels: int = 3,
        width: float = 1.0,
        resolution: float = 1.0,
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        stem, c1, c2, c3 = (scale_channels(c, width) for c in (16, 16 * k, 32 * k, 64 * k))
        self.conv1 = conv3x3(channels, stem, STEM_STRIDE[resolution])
        self.layer1 = wide_stage(stem, c1, 1, blocks)
        self.layer2 = wide_stage(c1, c2, 2, blocks)
        self.layer3 = wide_stage(c2, c3, 2, blocks)
        self.bn = nn.BatchNorm2d(c3)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c3, classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.relu(self.bn(x))
        return self.fc(self.avgpool(x).flatten(1))


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    f"wrn-{depth}-{k}": partial(WideResNet, depth, k) for depth, k in ((16, 4), (22, 8), (28, 10), (28, 12), (40, 2))
}
