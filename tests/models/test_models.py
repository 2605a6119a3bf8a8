"""Laws that every model keeps, and counts known from papers, ports and arithmetic."""

from __future__ import annotations

import functools
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from shoal.errors import ShoalError
from shoal.models import NAMES, build, list_models
from shoal.outputs import forward
from tests.support.quick_networks import ONE_OF_A_FAMILY, QUICK
from tests.support.tables import fast_where

CLASSES = 7
TABLE = fast_where(lambda name: name in QUICK and not name.startswith("msdnet-7"), NAMES)
RESNETS = [name for name in NAMES if name.startswith(("resnet", "wrn"))]
# Half of an odd number of channels is rounded where MSDNet ends a scale; tests/test_msdnet.py counts it.
EVEN = [name for name in NAMES if not name.startswith("msdnet")]


class Counts(NamedTuple):
    relus: dict[str, int]
    """path -> ReLU elements of one image"""
    macs: dict[str, int]
    """path -> conv MACs of one image"""


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build(name, CLASSES, width=0.25)


def images(channels: int = 3, side: int = 16) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


@functools.cache
def count(name: str, *, channels: int = 3, side: int = 32, width: float = 1.0, rho: float = 1.0) -> Counts:
    """ReLUs and conv MACs, from the output shapes of one meta-device forward."""
    counts = Counts({}, {})

    def record(path: str, module: nn.Module, out: Tensor) -> None:
        if isinstance(module, nn.ReLU):
            counts.relus[path] = out.numel()
        elif isinstance(module, nn.Conv2d):
            counts.macs[path] = out.numel() * module.weight[0].numel()

    with torch.device("meta"):
        net = build(name, 10, channels=channels, width=width, resolution=rho).eval()
        for path, module in net.named_modules():
            module.register_forward_hook(lambda m, _, out, path=path: record(path, m, out))
        net(torch.empty(1, channels, side, side))
    return counts


def stages(relus: dict[str, int]) -> dict[str, int]:
    """ReLUs by the first part of the path: `relu`, `layer1`, ..."""
    sums: Counter[str] = Counter()
    for path, elements in relus.items():
        sums[path.split(".")[0]] += elements
    return dict(sums)


def without_shortcuts(macs: dict[str, int]) -> dict[str, int]:
    return {path: n for path, n in macs.items() if "shortcut" not in path}


# -- laws of every model ------------------------------------------------------------------------------------


def test_list_models_lists_every_name_once() -> None:
    assert tuple(list_models()) == NAMES
    assert len(set(NAMES)) == len(NAMES) == 43


@pytest.mark.parametrize("name", TABLE)
def test_backward_reaches_every_parameter(name: str) -> None:
    net = small(name)
    logits = torch.cat(forward(net, images()).logits)
    assert logits.shape == (2 * len(forward(net, images()).logits), CLASSES)
    logits.square().sum().backward()
    for path, parameter in net.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path


@pytest.mark.parametrize("name", TABLE)
def test_trace_equals_eager(name: str) -> None:
    net = small(name).eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(symbolic_trace(net)(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", TABLE)
def test_every_relu_is_a_module_of_its_own_called_once(name: str) -> None:
    net = small(name)
    sites = [path for path, module in net.named_modules() if isinstance(module, nn.ReLU)]
    nodes = symbolic_trace(net).graph.nodes
    called = [node.target for node in nodes if node.op == "call_module" and node.target in sites]
    assert sorted(called) == sorted(sites)
    assert not [node for node in nodes if node.op != "call_module" and "relu" in str(node.target)]


@pytest.mark.parametrize("name", TABLE)
def test_channels_last_gives_the_same_logits(name: str) -> None:
    net = small(name).eval()
    x = images(side=20)
    with torch.no_grad():
        expected = torch.stack(forward(net, x).logits)
        # torch's own stubs lack this overload of Module.to.
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        actual = torch.stack(forward(net, x.to(memory_format=torch.channels_last)).logits)
    # Untrained norms let a deep net's values grow, so rounding is measured against the largest logit.
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("rho", [0.5, 0.25])
@pytest.mark.parametrize("name", TABLE)
def test_resolution_keeps_the_weights(name: str, rho: float) -> None:
    full = small(name)
    reduced = build(name, CLASSES, width=0.25, resolution=rho)
    reduced.load_state_dict(full.state_dict())
    assert forward(reduced, images(side=20)).final.shape == (2, CLASSES)


@pytest.mark.parametrize("name", ["resnet10", "resnet20", "wrn-16-4", "osakd-cnn1"])
def test_odd_sizes_and_widths_work(name: str) -> None:
    """One channel everywhere still needs strided shortcuts, and 17x23 rounds on every halving."""
    for width in (0.001, 0.3):
        net = build(name, 1, channels=2, width=width)
        assert net(torch.randn(2, 2, 17, 23)).shape == (2, 1)


@pytest.mark.parametrize("name", ["resnet18", "wrn-16-4"])
def test_initialisation(name: str) -> None:
    torch.manual_seed(0)
    net = build(name, CLASSES)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
    conv = net.get_submodule("layer2.0.conv2")
    assert isinstance(conv, nn.Conv2d)
    fan_out = conv.out_channels * 9
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


# -- golden counts ------------------------------------------------------------------------------------------

# name, ReLUs, ReLUs by stage, conv MACs with shortcuts, MACs of the shortcuts alone, conv depth; at 3x32x32
GOLDEN = [
    ("resnet18", 557_056, (65_536, 262_144, 131_072, 65_536, 32_768), 555_417_600, 6_291_456, 17),
    ("resnet34", 966_656, (65_536, 393_216, 262_144, 196_608, 49_152), 1_159_397_376, 6_291_456, 33),
    ("resnet10", 311_296, (65_536, 131_072, 65_536, 32_768, 16_384), None, 6_291_456, 9),
    ("resnet9", 245_760, (65_536, 65_536, 65_536, 32_768, 16_384), None, 6_291_456, 8),
    ("resnet56", 532_480, (16_384, 294_912, 147_456, 73_728), 125_485_056, 0, 55),
    ("wrn-22-8", 1_392_640, None, 2_454_110_208, 2_454_110_208 - 2_435_235_840, 19),
    ("vgg16", 276_480, (131_072, 65_536, 49_152, 24_576, 6_144), 313_196_544, 0, 13),
    ("vgg16-avg", 276_480, (131_072, 65_536, 49_152, 24_576, 6_144), 313_196_544, 0, 13),
    ("mobilenetv1", 411_648, None, 46_344_192, 0, 27),
]


@pytest.mark.parametrize(("name", "relus", "by_stage", "macs", "shortcut_macs", "depth"), GOLDEN)
def test_golden_counts(
    name: str, relus: int, by_stage: tuple[int, ...] | None, macs: int | None, shortcut_macs: int, depth: int
) -> None:
    counts = count(name)
    plain = without_shortcuts(counts.macs)
    assert sum(counts.relus.values()) == relus
    assert sum(counts.macs.values()) - sum(plain.values()) == shortcut_macs
    assert len(plain) == depth
    # No source gives stages for the wide net, nor MACs for the two short ones.
    assert by_stage is None or tuple(stages(counts.relus).values()) == by_stage
    assert macs is None or sum(counts.macs.values()) == macs


def test_wide_resnet_has_no_stem_relu_but_a_final_one() -> None:
    relus = count("wrn-22-8").relus
    assert len(relus) == 19
    assert next(iter(relus.items())) == ("layer1.0.relu1", 16_384)
    assert list(relus.items())[-1] == ("relu", 32_768)


def test_relu_paths_of_resnet18() -> None:
    blocks = [f"layer{stage}.{block}.relu{i}" for stage in range(1, 5) for block in range(2) for i in (1, 2)]
    assert list(count("resnet18").relus) == ["relu", *blocks]


# name, channels, side, ReLUs of each site, conv MACs; linear MACs 60,032 and 51,840 complete 652,832 and 1,939,840
OSAKD = [
    ("osakd-cnn1", 3, 32, (6 * 28 * 28, 16 * 10 * 10, 128, 64), 652_832 - 60_032),
    ("osakd-cnn2", 1, 28, (20 * 24 * 24, 50 * 8 * 8, 64), 1_939_840 - 51_840),
]


@pytest.mark.parametrize(("name", "channels", "side", "relus", "macs"), OSAKD)
def test_golden_osakd(name: str, channels: int, side: int, relus: tuple[int, ...], macs: int) -> None:
    counts = count(name, channels=channels, side=side)
    assert tuple(counts.relus.values()) == relus
    assert sum(counts.macs.values()) == macs


# By He et al.'s layers; OSAKD prints 0.07 and, with the teacher, 0.33 "GFLOPs", which are these MACs.
@pytest.mark.parametrize(("name", "macs"), [("resnet32-projection", 69_124_096), ("resnet110-projection", 253_149_184)])
def test_golden_macs_of_projection_shortcuts(name: str, macs: int) -> None:
    assert sum(count(name).macs.values()) == macs


# torchvision's networks without the last layer's 512,000 and 2,048,000, and Bottlenecks' 1x1 shortcuts included.
LARGE = [("resnet18-imagenet", 1_813_561_344, 2_308_096), ("resnet50-imagenet", 4_087_136_256, 9_608_704)]


@pytest.mark.parametrize(("name", "macs", "relus"), LARGE)
def test_imagenets_stem_makes_maps_of_56_to_7(name: str, macs: int, relus: int) -> None:
    found = count(name, side=224)
    assert sum(found.macs.values()) == macs
    assert sum(found.relus.values()) == relus


# -- width and resolution -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fast_where(lambda name: name in QUICK, EVEN))
def test_half_the_width_halves_the_relus(name: str) -> None:
    assert sum(count(name, width=0.5).relus.values()) * 2 == sum(count(name).relus.values())


@pytest.mark.parametrize("rho", [0.5, 0.25])
@pytest.mark.parametrize("name", fast_where(lambda name: name in ONE_OF_A_FAMILY, RESNETS))
def test_resolution_scales_every_site_by_its_square(name: str, rho: float) -> None:
    side = 256 if name.endswith("-imagenet") else 32
    full, reduced = count(name, side=side).relus, count(name, side=side, rho=rho).relus
    assert reduced == {path: int(n * rho**2) for path, n in full.items()}


@pytest.mark.parametrize(("name", "channels", "side"), [row[:3] for row in OSAKD])
def test_half_the_resolution_quarters_the_conv_relus_of_osakd(name: str, channels: int, side: int) -> None:
    full = count(name, channels=channels, side=side).relus
    reduced = count(name, channels=channels, side=side, rho=0.5).relus
    assert reduced == {path: n if path.startswith("head") else n // 4 for path, n in full.items()}


@pytest.mark.parametrize(
    ("name", "width", "rho", "relus"),
    [("resnet10", 0.5, 1.0, 155_648), ("resnet9", 0.5, 0.5, 30_720)],
)
def test_deepreduce_table_7(name: str, width: float, rho: float, relus: int) -> None:
    assert sum(count(name, width=width, rho=rho).relus.values()) == relus


# -- must fail ----------------------------------------------------------------------------------------------

BAD = [
    ({"name": "resnet19"}, r"found 'resnet19' at build\(name\); need one of resnet9, .*; try resnet9 or resnet18"),
    ({"name": "ResNet18"}, "try resnet18"),
    ({"name": "wrn-22-9"}, "try wrn-22-8"),
    ({"name": "zzz"}, r"need one of .*osakd-cnn2; choose one of them"),
    ({"name": None}, r"found None at build\(name\)"),
    ({"classes": 0}, r"found 0 at build\(classes\); need an integer of at least 1"),
    ({"classes": -3}, "found -3"),
    ({"classes": 2.5}, "found 2.5"),
    ({"classes": "10"}, "found '10'"),
    ({"classes": True}, "found True"),
    ({"channels": 0}, r"found 0 at build\(channels\)"),
    ({"width": 0}, r"found 0 at build\(width\); need a finite number above 0"),
    ({"width": -1.0}, "found -1.0"),
    ({"width": float("nan")}, "found nan"),
    ({"width": float("inf")}, "found inf"),
    ({"width": "0.5"}, "found '0.5'"),
    ({"resolution": 0.3}, r"found 0.3 at build\(resolution\); need 1, 0.5 or 0.25"),
    ({"resolution": 2}, "found 2"),
    ({"resolution": 0}, "found 0"),
    ({"resolution": "half"}, "found 'half'"),
    ({"resolution": [0.5]}, "found"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_arguments_are_refused(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        build(**{"name": "resnet10", "classes": 10, **bad})  # type: ignore[arg-type]
