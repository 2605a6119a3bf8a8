"""Networks that oneDNN would corrupt in channels_last train in contiguous memory, and with right gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from shoal.channels.slimmable import slimmable
from shoal.models import build
from shoal.training.loop import fit
from shoal.training.memory_format import compiled_layout, suit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.conftest import Residual, blobs


def conv(inputs: int, kernel: int, stride: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(inputs, 8, kernel, stride, kernel // 2))


def slim(least: float) -> nn.Module:
    return slimmable(build("resnet10", 10, width=0.5), (3, 16, 16), (least, 1.0))


@pytest.mark.parametrize(
    ("make", "settings", "kept"),
    [
        (conv(15, 1, 2), Settings(), False),
        (conv(16, 1, 2), Settings(), True),
        (conv(4, 1, 1), Settings(), True),
        (conv(4, 3, 2), Settings(), True),
        (conv(4, 1, 2), Settings(channels_last=False), False),
        (conv(4, 1, 2), Settings(device="cuda"), True),
        (Residual, Settings(), False),
        (lambda: build("resnet10", 10, width=0.25), Settings(), True),
        (lambda: build("resnet10", 10, width=0.125), Settings(), False),
        (lambda: slim(0.25), Settings(), False),
        (lambda: slim(0.5), Settings(), True),
    ],
)
def test_only_strided_pointwise_convolutions_of_few_inputs_leave_channels_last(
    make: Callable[[], nn.Module], settings: Settings, kept: bool
) -> None:
    assert suit(settings, make()).channels_last is kept


def test_a_network_of_few_channels_trains_as_in_contiguous_memory() -> None:
    """Where the fault is, this aborts the interpreter or gives other weights."""
    torch.manual_seed(3)
    first = Residual()
    second = copy.deepcopy(first)
    for network, channels_last in ((first, True), (second, False)):
        settings = Settings(channels_last=channels_last)
        fit(network, blobs(64), Objective((cross_entropy(),)), Schedule(1, 0.1, batch_size=16), settings=settings)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_the_compiler_chooses_no_channels_last_where_the_settings_have_it_off() -> None:
    from torch._inductor import config

    usual = config.layout_optimization
    with compiled_layout(Settings(channels_last=False)):
        assert not config.layout_optimization
    with compiled_layout(Settings()):
        assert config.layout_optimization == usual
    assert config.layout_optimization == usual


def test_a_network_from_a_stage_in_channels_last_trains_in_contiguous_memory_too() -> None:
    """As a slimmable network does whose narrowest width alone has few channels: the stage before had them all."""
    before = build("resnet10", 4, channels=1, width=0.25).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = slimmable(before, (1, 8, 8), (0.5, 1.0))
    assert not all(value.is_contiguous() for value in network.parameters())
    fit(network, blobs(8), Objective((cross_entropy(),)), Schedule(1, 0.1, batch_size=8))
    assert all(value.is_contiguous() for value in network.parameters())
