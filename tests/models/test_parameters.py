"""Numbers of parameters of the networks, known from papers, ports and closed forms."""

from __future__ import annotations

import pytest
import torch

from shoal.models import build

# name, channels, parameters for ten classes: as the well-known CIFAR ports and OSAKD's arithmetic have them
PARAMETERS = [
    ("resnet18", 3, 11_173_962),
    ("resnet34", 3, 21_282_122),
    ("resnet20", 3, 269_722),
    ("resnet32", 3, 464_154),
    ("resnet44", 3, 658_586),
    ("resnet56", 3, 853_018),
    ("resnet110", 3, 1_727_962),
    ("resnet32-projection", 3, 466_906),
    ("resnet110-projection", 3, 1_730_714),
    ("wrn-16-4", 3, 2_748_890),
    ("wrn-28-10", 3, 36_479_194),
    ("wrn-40-2", 3, 2_243_546),
    ("osakd-cnn1", 3, 63_106),
    ("osakd-cnn2", 1, 77_484),
]

# name, parameters for 1000 classes as its authors' or torchvision's ImageNet network has them, and what the stem takes
# off: 7x7 for 3x3 at 64 channels is 7,680 weights more; ResNeSt's three convolutions and their norms 26,912.
IMAGENET = [
    ("resnet50", 25_557_032, 7_680),
    ("resnet101", 44_549_160, 7_680),
    ("resnet152", 60_192_808, 7_680),
    ("wrn50-2", 68_883_240, 7_680),
    ("wrn101-2", 126_886_696, 7_680),
    ("senet18", 11_778_592, 7_680),
    ("senet50", 28_088_024, 7_680),
    ("senet101", 49_326_872, 7_680),
    ("resnext50-4", 25_028_904, 7_680),
    ("resnext101-8", 88_791_336, 7_680),
    ("resnest50", 27_483_240, 26_912),
    ("mobilenetv2", 3_504_872, 0),
    ("shufflenetv2", 2_278_604, 0),
    ("resnet18-imagenet", 11_689_512, 0),
    ("resnet34-imagenet", 21_797_672, 0),
    ("resnet50-imagenet", 25_557_032, 0),
    ("resnet101-imagenet", 44_549_160, 0),
    ("resnet152-imagenet", 60_192_808, 0),
    ("wrn50-2-imagenet", 68_883_240, 0),
    ("resnext50-4-imagenet", 25_028_904, 0),
]


@pytest.mark.parametrize(("name", "parameters", "stem"), IMAGENET)
def test_parameters_are_those_of_the_published_networks(name: str, parameters: int, stem: int) -> None:
    with torch.device("meta"):
        net = build(name, 1000)
    assert sum(p.numel() for p in net.parameters()) == parameters - stem


@pytest.mark.parametrize(("name", "channels", "parameters"), PARAMETERS)
def test_golden_parameters(name: str, channels: int, parameters: int) -> None:
    with torch.device("meta"):
        net = build(name, 10, channels=channels)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(("depth", "k"), [(16, 4), (22, 8), (28, 10), (28, 12), (40, 2)])
def test_wide_resnets_have_the_parameters_of_a_closed_form(depth: int, k: int) -> None:
    """Three stages of n blocks of two 3x3 convolutions, each after a batch norm (two parameters a channel).

    The first block of a stage maps the channels of the stage before, also by its 1x1 shortcut.
    """
    n, total, before = (depth - 4) // 6, 9 * 3 * 16, 16
    for c in (16 * k, 32 * k, 64 * k):
        total += 9 * before * c + (2 * n - 1) * 9 * c**2 + before * c + 2 * before + (2 * n - 1) * 2 * c
        before = c
    total += 2 * before + 10 * before + 10
    with torch.device("meta"):
        net = build(f"wrn-{depth}-{k}", 10)
    assert sum(p.numel() for p in net.parameters()) == total
