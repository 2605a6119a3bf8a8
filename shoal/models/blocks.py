"""Parts that several networks share: 3x3 convolutions, shortcuts, channel scaling and initialisation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

STEM_STRIDE = {1.0: 1, 0.5: 2, 0.25: 4}
"""Resolution rho -> stride of the stem's convolution, which scales all later maps by rho."""


def scale_channels(count: int, width: float) -> int:
    """`count` channels times `width` (DeepReDuce's alpha), rounded, at least 1."""
    return max(1, round(count * width))


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    """3x3 conv, padding 1; (N, c_in, H, W) -> (N, c_out, ceil(H/stride), ceil(W/stride))."""
    # No bias, since a BatchNorm with a shift follows, directly or before the next convolution.
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)


def conv7x7(c_in: int, c_out: int, stride: int) -> nn.Conv2d:
    """7x7 conv, padding 3, as in ImageNet's stem; (N, c_in, H, W) -> (N, c_out, ceil(H/stride), ceil(W/stride))."""
    return nn.Conv2d(c_in, c_out, 7, stride=stride, padding=3, bias=False)


def init_weights(net: nn.Module) -> None:
    """Initialise convolutions with Kaiming normal (fan out), BatchNorms with scale 1 and shift 0, in place.

    Linear layers keep PyTorch's initialisation.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class PadShortcut(nn.Module):
    """Option A of He et al., without weights: subsample the map by `stride` and fill the new channels with zeros.

    (N, c_in, H, W) -> (N, c_out, ceil(H/stride), ceil(W/stride)).
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        # Half of the zeros on either side, as in common CIFAR implementations, so that their checkpoints can be used.
        self.before = (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


def projection_shortcut(c_in: int, c_out: int, stride: int) -> nn.Module:
    """Option B of He et al.: 1x1 convolution and BatchNorm; shapes as in `PadShortcut`."""
    conv = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(c_out)))


Shortcut = Callable[[int, int, int], nn.Module]
"""A function (c_in, c_out, stride) -> the module on the skip path."""


def make_shortcut(c_in: int, c_out: int, stride: int, shortcut: Shortcut) -> nn.Module:
    """The identity if the block does not change the shape, else the module that `shortcut` makes."""
    # Both are compared, since with a very small width a strided stage may keep its channel count.
    return nn.Identity() if stride == 1 and c_in == c_out else shortcut(c_in, c_out, stride)
