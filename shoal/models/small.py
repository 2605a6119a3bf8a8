"""The two small CNNs of OSAKD: 5x5 convs with bias, 2x2 max-pools, linear layers, no BatchNorm.

Source: Tzelepi & Tefas, "Efficient training of lightweight neural networks using Online Self-Acquired
Knowledge Distillation", section IV.A.

| name       | paper's data    | convs  | linear         | parameters | conv and linear MACs |
|------------|-----------------|--------|----------------|------------|----------------------|
| osakd-cnn1 | CIFAR-10, SVHN  | 6, 16  | 128, 64, `C`   | 63,106     | 652,832 at 3x32x32   |
| osakd-cnn2 | Fashion MNIST   | 20, 50 | 64, `C`        | 77,484     | 1,939,840 at 1x28x28 |

The paper gives neither the padding nor the input of the first linear layer. The counts above are those of
unpadded convs, which leave a 5x5 (cnn1) or 4x4 (cnn2) map at the paper's sizes. For any other size an adaptive
average pool (`fit`) makes that map, so that the weights take every input of 16x16 and up; at the paper's own
sizes it changes nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from shoal.models.blocks import STEM_STRIDE, init_weights, scale_channels


class SmallCNN(nn.Module):
    """conv1-relu1-pool1-conv2-relu2-pool2-fit, then `head`: fc1-relu3(-fc2-relu4)-fc.

    (N, channels, H, W) -> logits (N, classes); H, W >= 16, or >= 20 where `resolution` < 1.
    `width` scales the convs and the hidden linear layers alike. `resolution` strides conv1 and so cuts the
    ReLUs of the convs by its square (exactly for 0.5 at the paper's sizes, roughly for 0.25); the ReLUs of the
    linear layers have no map to shrink and stay.
    """

    def __init__(
        self,
        convs: tuple[int, int],
        hidden: tuple[int, ...],
        side: int,
        classes: int,
        *,
        channels: int = 3,
        width: float = 1.0,
        resolution: float = 1.0,
    ) -> None:
        super().__init__()
        c1, c2 = (scale_channels(c, width) for c in convs)
        stride = STEM_STRIDE[resolution]
        self.conv1 = nn.Conv2d(channels, c1, 5, stride=stride)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        # An unpadded conv2 takes 4 pixels off its map. Take 2 off a map of half the side, none off a quarter:
        # else the ReLUs would not follow rho squared, and the quarter map would vanish.
        self.conv2 = nn.Conv2d(c1, c2, 5, padding=stride // 2)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fit = nn.AdaptiveAvgPool2d(side)
        sizes = (c2 * side * side, *(scale_channels(size, width) for size in hidden))
        self.head = linear_head(sizes, classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return self.head(self.fit(x).flatten(1))


def linear_head(sizes: tuple[int, ...], classes: int) -> nn.Sequential:
    """(N, sizes[0]) -> (N, classes), through one ReLU layer for every further size."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(1, len(sizes)):
        layers[f"fc{i}"] = nn.Linear(sizes[i - 1], sizes[i])
        # The convs hold relu1 and relu2; numbering on keeps the last part of a path unique in the net.
        layers[f"relu{i + 2}"] = nn.ReLU()
    layers["fc"] = nn.Linear(sizes[-1], classes)
    return nn.Sequential(layers)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "osakd-cnn1": partial(SmallCNN, (6, 16), (128, 64), 5),
    "osakd-cnn2": partial(SmallCNN, (20, 50), (64,), 4),
}
