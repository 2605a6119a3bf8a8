"""Classifiers with attention and alignment: exact counts of the paper's networks, where they go, what they keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from shoal.errors import ShoalError
from shoal.exits.attention import (
    ATTENTIONS,
    Attention,
    BottleneckAttention,
    ChannelAndSpatialAttention,
    SepConv,
    add_adapters,
    add_aligned_exits,
    alignment,
    feature_taps,
)
from shoal.exits.classifiers import keep_exit
from shoal.exits.points import SCHEMES, exit_points
from shoal.graph.counting import Cost, cost
from shoal.graph.folding import fold
from shoal.graph.graph import Graph, live
from shoal.models import build
from shoal.networks.spec import EXIT_KINDS
from shoal.outputs import forward
from shoal.private.compiler.refusal import refusals
from shoal.surgery.normal_form import drop_unread
from shoal.surgery.tracing import count, trace
from tests.conftest import Residual, randomise
from tests.support.tables import fast_first

CIFAR, SMALL = (3, 32, 32), (1, 8, 8)


def macs(total: Cost) -> int:
    """Multiply-adds of convolutions and linear layers."""
    return total.macs + total.linear_macs


# name, parameters with all branches, parameters on the way to each classifier, MACs to each alone and one after the
# other: CIFAR-100, 32x32. In millions these are 165.16, 295.79, 426.64, 555.47; 165.16, 308.19, 447.85, 582.12 and
# 407.87, 691.31, 1118.25, 1298.01; 407.87, 879.3, 1442.1, 1706.6.
COUNTS = [
    (
        "resnet18",
        12_283_344,
        (479_652, 1_017_508, 3_166_372, 11_220_132),
        (165_160_960, 295_790_592, 426_641_408, 555_468_800),
        (165_160_960, 308_187_136, 447_846_400, 582_115_328),
    ),
    (
        "resnet50",
        38_426_576,
        (4_731_556, 6_147_748, 14_032_548, 23_705_252),
        (407_871_488, 691_314_688, 1_118_248_960, 1_298_014_208),
        (407_871_488, 879_312_896, 1_442_144_256, 1_706_590_208),
    ),
]


@pytest.mark.parametrize(("name", "whole", "paths", "alone", "cascaded"), fast_first(COUNTS))
def test_counts_of_the_papers_networks(
    name: str, whole: int, paths: tuple[int, ...], alone: tuple[int, ...], cascaded: tuple[int, ...]
) -> None:
    plain = build(name, 100)
    graph = trace(add_aligned_exits(plain, exit_points(plain, CIFAR), 100, CIFAR), CIFAR)
    assert cost(graph).params == whole
    parts = [part_of(graph, graph.outputs[i : i + 1]) for i in range(4)]
    assert tuple(part.params for part in parts) == paths
    assert tuple(map(macs, parts)) == alone
    assert tuple(macs(part_of(graph, graph.outputs[: i + 1])) for i in range(4)) == cascaded


def part_of(graph: Graph, outputs: tuple[str, ...]) -> Cost:
    """The cost of what some classifiers need."""
    cut = replace(graph, outputs=outputs)
    return cost(cut.with_nodes([node for node in graph.nodes if node.name in live(cut)], graph.weights))


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.slow
def test_counts_of_resnet18s_branches() -> None:
    plain = build("resnet18", 100)
    model = add_aligned_exits(plain, exit_points(plain, CIFAR), 100, CIFAR)
    branches = [model.get_submodule(tap.rpartition(".")[0]) for tap in feature_taps(model)[:3]]
    assert [size(b.get_submodule("attention")) for b in branches] == [9_728, 35_840, 137_216]
    assert [size(b.get_submodule("align")) for b in branches] == [268_800, 254_976, 202_752]
    rows = count(model, CIFAR).rows
    totals = [sum(r.macs + r.linear_macs for r in rows if r.name.startswith(f"exits.layer{i}_")) for i in (1, 2, 3)]
    assert [round(total / 1e6, 2) for total in totals] == [12.40, 8.81, 5.44]


TOTALS = [("resnet152", 73_062_352, 4_130.9), ("wrn50-2", 81_752_784, 4_093.1)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "params", "millions"), TOTALS)
def test_totals_of_the_deep_networks(name: str, params: int, millions: float) -> None:
    plain = build(name, 100)
    model = add_aligned_exits(plain, exit_points(plain, CIFAR), 100, CIFAR)
    total = count(model, CIFAR)
    assert total.params == params
    assert round(macs(total) / 1e6, 1) == millions


# section 4.10 for the 16 blocks of ResNet50: 4, 8, 12; 3, 7, 13; 1, 2, 3; 13, 14, 15
BLOCKS = [f"layer{stage + 1}.{i}.relu3" for stage, depth in enumerate((3, 4, 6, 3)) for i in range(depth)]
PLACES = [
    ("uniform", None, (4, 8, 12)),
    ("uniform", 1, (8,)),
    ("downsample", None, (3, 7, 13)),
    ("shallow", None, (1, 2, 3)),
    ("shallow", 5, (1, 2, 3, 4, 5)),
    ("deep", None, (13, 14, 15)),
    ("every-block", None, tuple(range(1, 16))),
]


@pytest.mark.parametrize(("scheme", "number", "places"), PLACES)
def test_schemes_on_resnet50(scheme: str, number: int | None, places: tuple[int, ...]) -> None:
    found = exit_points(build("resnet50", 10, width=0.1), CIFAR, scheme, number)
    assert found == tuple(BLOCKS[place - 1] for place in places)


def test_every_layer_is_every_relu_but_the_last() -> None:
    assert len(exit_points(build("resnet18", 10, width=0.1), CIFAR, "every-layer")) == 16


# Networks whose sums or joints are followed by something else than a ReLU; the paper has 4 and 3 classifiers for two
KINDS = [
    ("mobilenetv2", ("blocks.2.out", "blocks.5.out", "blocks.12.out")),
    ("shufflenetv2", ("stages.0.3.shuffle", "stages.1.7.shuffle")),
    ("senet18", ("layer1.1.relu2", "layer2.1.relu2", "layer3.1.relu2")),
    ("wrn-16-4", ("layer2.0.relu1", "layer3.0.relu1")),
    ("vgg16", ("layer1.1.relu", "layer2.1.relu", "layer3.2.relu", "layer4.2.relu")),
]


@pytest.mark.parametrize(("name", "points"), KINDS)
def test_exits_come_before_each_change_of_resolution(name: str, points: tuple[str, ...]) -> None:
    plain = randomise(build(name, 10, width=0.25))
    assert exit_points(plain, CIFAR) == points
    x = torch.randn(2, *CIFAR)
    logits = add_aligned_exits(plain, points, 10, CIFAR)(x)
    assert [z.shape for z in logits] == [(2, 10)] * (len(points) + 1)
    assert (logits[-1] - plain(x)).abs().max() <= 1e-5 * plain(x).abs().max()


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "uniform"])
def test_a_users_network_has_exits_at_every_scheme(scheme: str) -> None:
    plain = randomise(Residual())
    number = 1 if scheme in ("shallow", "deep") else None
    points = exit_points(plain, SMALL, scheme, number)
    model = add_aligned_exits(plain, points, 4, SMALL)
    x = torch.randn(3, *SMALL)
    assert len(model(x)) == len(points) + 1
    assert torch.allclose(model(x)[-1], plain(x), atol=1e-6)


def test_other_image_sizes_than_that_of_the_surgery_work() -> None:
    plain = build("resnet10", 5, width=0.1)
    model = add_aligned_exits(plain, exit_points(plain, CIFAR), 5, CIFAR).eval()
    for side in (16, 27, 40):
        assert [z.shape for z in model(torch.randn(2, 3, side, side))] == [(2, 5)] * 4


def test_attention_keeps_the_shape_and_only_weakens() -> None:
    attention, x = randomise(Attention(6)), torch.randn(2, 6, 7, 5)
    y = attention(x)
    assert y.shape == x.shape
    assert (y.abs() <= x.abs()).all()
    assert (y * x >= 0).all()
    assert SepConv(6, 4)(x).shape == (2, 4, 4, 3)


# Parameters and MACs of the attention modules after 64 x 32 x 32, 128 x 16 x 16 and 256 x 8 x 8, with h = C / 16:
# SE: 2Ch + h + C, and 2Ch MACs. CBAM: 100 more for 7x7 and its norm; 4Ch + 98HW MACs. BAM: 3Ch + 3h + C for the first
# three 1x1 convolutions with two norms, 3h + 2(9h^2 + 3h) + h + 1 for the rest; 2Ch + HW(Ch + 18h^2 + h) MACs.
MODULES = [
    ("attention-se", (580, 2_184, 8_464), (512, 2_048, 8_192)),
    ("attention-cbam", (680, 2_284, 8_564), (101_376, 29_184, 22_656)),
    ("attention-bam", (1_173, 4_457, 17_361), (561_664, 561_152, 566_272)),
]


@pytest.mark.parametrize(("kind", "params", "totals"), MODULES)
def test_counts_of_the_other_attention_modules(kind: str, params: tuple[int, ...], totals: tuple[int, ...]) -> None:
    plain = build("resnet10", 5)
    model = add_aligned_exits(plain, exit_points(plain, CIFAR), 5, CIFAR, kind=kind)
    parts = [f"{tap.rpartition('.')[0]}.attention" for tap in feature_taps(model)[:3]]
    assert tuple(size(model.get_submodule(part)) for part in parts) == params
    rows = count(model, CIFAR).rows
    found = [sum(r.macs + r.linear_macs for r in rows if r.name.startswith(f"{part}.")) for part in parts]
    assert tuple(found) == totals


def test_cbam_is_its_papers_formula() -> None:
    module, x = randomise(ChannelAndSpatialAttention(32)).eval(), torch.randn(3, 32, 5, 7)

    def mlp(pooled: torch.Tensor) -> torch.Tensor:
        hidden = (pooled @ module.fc1.weight[:, :, 0, 0].T + module.fc1.bias).relu()
        return hidden @ module.fc2.weight[:, :, 0, 0].T + module.fc2.bias

    channels = (mlp(x.flatten(2).mean(2)) + mlp(x.flatten(2).max(2).values)).sigmoid()
    y = x * channels[:, :, None, None]
    positions = module.bn(module.conv(torch.stack((y.max(1).values, y.mean(1)), 1))).sigmoid()
    assert torch.allclose(module(x), y * positions, atol=1e-6)


def test_bam_adds_a_part_of_each_value_between_none_and_all() -> None:
    module, x = randomise(BottleneckAttention(32)).eval(), torch.randn(3, 32, 5, 7)
    part = module(x) / x - 1
    assert ((part > 0) & (part < 1)).all()
    logit = torch.logit(part.double())
    assert torch.linalg.matrix_rank(logit[0].flatten(1), rtol=1e-3) == 1  # channel x position


@pytest.mark.parametrize("kind", ["attention-se", "attention-cbam", "attention-bam"])
def test_the_other_attention_modules_train_and_are_refused_as_products(kind: str) -> None:
    plain = build("resnet10", 5, width=0.1)
    model = add_aligned_exits(plain, exit_points(plain, CIFAR), 5, CIFAR, kind=kind)
    sum(logits.square().sum() for logits in model(torch.randn(2, *CIFAR))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    found = [r.error() for r in refusals(fold(trace(keep_exit(model.eval(), 0), CIFAR)))]
    assert any("private inference has no product of two private values" in str(error) for error in found)


def test_a_network_can_have_every_kind_of_aligned_exit() -> None:
    assert set(ATTENTIONS) | {"plain", "pooled"} == set(EXIT_KINDS)


@pytest.mark.parametrize(
    ("channels", "halvings", "features", "expected"),
    [
        (64, 3, 512, (64, 128, 256, 512)),
        (256, 1, 512, (256, 512)),
        (512, 0, 512, (512, 512)),
        (8, 4, 12, (8, 12, 12, 12, 12)),
    ],
)
def test_alignment_doubles_until_it_fits(
    channels: int, halvings: int, features: int, expected: tuple[int, ...]
) -> None:
    assert alignment(channels, halvings, features) == expected


def test_features_are_what_the_classifiers_read() -> None:
    plain = randomise(build("resnet10", 5, width=0.1))
    model = randomise(add_aligned_exits(plain, exit_points(plain, CIFAR), 5, CIFAR))
    taps = feature_taps(model)
    assert taps[-1] == "exits.final.features"
    out = forward(model, torch.randn(2, *CIFAR), taps)
    layers = [model.get_submodule(tap.replace("features", "fc")) for tap in taps[:-1]] + [model.get_submodule("fc")]
    for layer, tap, logits in zip(layers, taps, out.logits, strict=True):
        assert torch.allclose(layer(out.taps[tap]), logits, atol=1e-6)


def test_adapters_are_tapped_and_cut_away() -> None:
    plain = build("resnet10", 5, width=0.1)
    model = add_aligned_exits(plain, exit_points(plain, CIFAR), 5, CIFAR).eval()
    taps = feature_taps(model)
    adapted, names = add_adapters(model, taps[1:3])
    x = torch.randn(2, *CIFAR)
    out = forward(adapted, x, (*names, *taps))
    for name, tap in zip(names, taps[1:3], strict=True):
        assert torch.allclose(out.taps[name], adapted.get_submodule(name)(out.taps[tap]))
    assert size(adapted) == size(model) + 2 * (51 * 51 + 51)
    assert drop_unread(adapted).state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(out.logits, model(x), strict=True))


def test_exits_without_attention_have_private_forms_and_attention_is_refused_by_name() -> None:
    plain = build("resnet10", 5, width=0.1)
    points = exit_points(plain, CIFAR)
    for kind, refused in (("aligned", []), ("attention", ["interpolate", "sigmoid", "mul"])):
        model = keep_exit(add_aligned_exits(plain, points, 5, CIFAR, kind=kind), 0)
        assert [r.node for r in refusals(fold(trace(model, CIFAR)))] == refused


BAD = [
    ({"scheme": "random"}, "found scheme 'random'; need one of downsample, every-block"),
    ({"scheme": "downsample", "count": 2}, "found 2 exits for scheme 'downsample'; need no number"),
    ({"scheme": "uniform", "count": 8}, "found 8 exits for a network of 8 blocks; need 1 to 7"),
    ({"scheme": "deep", "count": 0}, "found 0 exits for a network of 8 blocks"),
]


@pytest.mark.parametrize(("choice", "message"), BAD)
def test_impossible_places_are_refused(choice: dict[str, object], message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        exit_points(build("resnet18", 10, width=0.1), CIFAR, **choice)  # type: ignore[arg-type]


def test_what_cannot_have_aligned_exits_is_refused() -> None:
    plain = build("resnet10", 5, width=0.1)
    with pytest.raises(ShoalError, match=r"found no site \['layer9'\] for an exit"):
        add_aligned_exits(plain, ["layer9"], 5, CIFAR)
    with pytest.raises(ShoalError, match="need a linear layer"):
        add_aligned_exits(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten()), ["1"], 3, SMALL)
    with pytest.raises(ShoalError, match="found no aligned exits"):
        feature_taps(plain)
