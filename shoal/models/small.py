"""The two small CNNs of OSAKD: 5x5 convs with bias, 2x2 max-pools, linear layers, no BatchNorm.

Source: Tzelepi & Tefas, "Efficient training of lightweight neural networks using Online Self-Acquired
Knowledge Distillation", section IV.A.

| name       | paper's data    | convs  | linear         | parameters | conv and linear MACs |
|------------|-----------------|--------|----------------|------------|----------------------|
| osakd-cnn1 | CIFAR-10, SVHN  | 6, 16  | 128, 64, `C`   | 63,106     | 652,832 at 3x32x32   |
| osakd-cnn2 | Fashion MNIST   | 20, 50 | 64, `C`        | 77,484     | 1,939,840 at 1x28x28 |

The paper states neither the padding nor the input size of the first linear layer. Here the convs are unpadded, which
gives a 5x5 (cnn1) or 4x4 (cnn2) map at the paper's image sizes, and the counts above. For other sizes an adaptive
average pool (`fit`) gives a map of that size, so that images may have any size from 16x16; at the paper's sizes it does
nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from shoal.models.blocks import STEM_STRIDE, init_weights, scale_channels


@dataclass(frozen=True)
class Sizes:
    """Channels of the two convs, sizes of the hidden linear layers, and the `side` of the map that `fit` makes."""

    convs: tuple[int, int]
    hidden: tuple[int, ...]
    side: int


class SmallCNN(nn.Module):
    """conv1-relu1-pool1-conv2-relu2-pool2-fit, then `head`: fc1-relu3(-fc2-relu4)-fc.

    (N, channels, H, W) -> logits (N, classes); H, W >= 16, or >= 20 where `resolution` < 1.
    `width` multiplies the sizes of the convs and of the hidden linear layers. `resolution` sets the stride of conv1,
    and so multiplies the number of the convs' ReLUs by its square (exactly for 0.5 at the paper's sizes, roughly for
    0.25). The ReLUs of the linear layers do not depend on it.
    """

    def __init__(
        self, sizes: Sizes, classes: int, *, channels: int = 3, width: float = 1.0, resolution: float = 1.0
    ) -> None:
        super().__init__()
        c1, c2 = (scale_channels(c, width) for c in sizes.convs)
        stride = STEM_STRIDE[resolution]
        self.conv1 = nn.Conv2d(channels, c1, 5, stride=stride)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        # Without padding conv2 makes its map 4 pixels smaller. For resolution 0.5 it is to be 2 smaller and for 0.25
        # none, so that the number of ReLUs follows rho squared and the map does not vanish.
        self.conv2 = nn.Conv2d(c1, c2, 5, padding=stride // 2)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fit = nn.AdaptiveAvgPool2d(sizes.side)
        hidden = (scale_channels(size, width) for size in sizes.hidden)
        self.head = linear_head((c2 * sizes.side**2, *hidden), classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return self.head(self.fit(x).flatten(1))


def linear_head(sizes: tuple[int, ...], classes: int) -> nn.Sequential:
    """Linear layers (N, sizes[0]) -> (N, classes), with a ReLU after each hidden layer; the other sizes are hidden."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, len(sizes)):
        layers[f"fc{i}"] = nn.Linear(sizes[i - 1], sizes[i])
        # relu1 and relu2 follow the convs. The numbers go on, so that these names are unique in the network.
        layers[f"relu{i + 2}"] = nn.ReLU()
    layers["fc"] = nn.Linear(sizes[-1], classes)
    return nn.Sequential(layers)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "osakd-cnn1": partial(SmallCNN, Sizes((6, 16), (128, 64), 5)),
    "osakd-cnn2": partial(SmallCNN, Sizes((20, 50), (64,), 4)),
}
