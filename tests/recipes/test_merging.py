"""Linear runs merged: DeepReDuce's Tables 6, 7 and 8 by its own accounting, and the exact linear tail."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn

from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.models import build
from shoal.recipes.deepreduce.designs import Design, apply, drops
from shoal.recipes.deepreduce.merging import BLOCKS, STAGES, TABLE_8, UNMERGED, Merged, Merging, merged_cost
from shoal.reduction.dropping import drop_blocks, drop_relus
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import count, trace
from tests.conftest import randomise
from tests.support.tables import fast_first

CIFAR = (3, 32, 32)


@lru_cache(maxsize=16)
def base(name: str, width: float = 1.0, resolution: float = 1.0) -> nn.Module:
    """Shapes alone, which is all that is counted here."""
    with torch.device("meta"):
        return build(name, 100, width=width, resolution=resolution).eval()


def merged(name: str, design: Design, merging: Merging) -> Merged:
    model = base(name, design.width, design.resolution)
    return merged_cost(model, CIFAR, drops(design, model, CIFAR)[1], merging)


# network, design, how the table merges, printed #Conv
TABLE_7 = [
    ("resnet10", Design(width=0.5), BLOCKS, 9),
    ("resnet18", Design((1,), (2, 4)), UNMERGED, 17),
    ("resnet10", Design((), (1, 2, 3, 4), resolution=0.5), UNMERGED, 9),
    ("resnet18", Design((1, 4), (2, 3), width=0.5), STAGES, 11),
    ("resnet9", Design(width=0.5, resolution=0.5), BLOCKS, 8),
    ("resnet18", Design((1,), (2, 3, 4), resolution=0.5), BLOCKS, 8),
    ("resnet18", Design((1, 4), (2, 3), resolution=0.5), BLOCKS, 7),
]


@pytest.mark.parametrize(("name", "design", "merging", "printed"), fast_first(TABLE_7))
def test_table_7_convolutions(name: str, design: Design, merging: Merging, printed: int) -> None:
    assert merged(name, design, merging).convs == printed


@pytest.mark.parametrize(
    ("design", "macs", "printed"),
    # The base has 125,485,056; a convolution of S1 or S2 with equal channels 2,359,296, of which 16, then 9 more, go.
    [(Design((1,)), 125_485_056 - 16 * 2_359_296, 87.7), (Design((1,), (2,)), 125_485_056 - 25 * 2_359_296, 66.5)],
)
@pytest.mark.slow
def test_table_8_multiply_adds(design: Design, macs: int, printed: float) -> None:
    assert merged("resnet56", design, TABLE_8).macs == macs
    assert round(macs / 1e6, 1) == printed


# culled, thinned, width, resolution; DeepReDuce's and the other's ReLUs in thousands, printed ratio
TABLE_6 = [
    (Design((1, 4)), 197, 344, 1.75),
    (Design((1,), (2, 3, 4), 1.0, 0.5), 28.6, 100, 3.5),
    (Design((1,), (2, 3, 4), 1.0, 0.5), 28.6, 86, 3.0),
    (Design((1, 4), (2, 3), 0.5, 0.5), 12.3, 50, 4.0),
    (Design((1,), (2, 3, 4), 1.0, 0.5), 28.7, 300, 10.5),
    (Design((1, 4), (2, 3), 1.0, 0.5), 24.6, 180, 7.3),
    (Design((1, 4), (2, 3), 0.5, 1.0), 49.2, 50, 1.0),
]


@pytest.mark.parametrize(("design", "printed", "other", "ratio"), fast_first(TABLE_6))
def test_table_6_relus(design: Design, printed: float, other: float, ratio: float) -> None:
    model = base("resnet18", design.width, design.resolution)
    thousands = count(apply(design, model, CIFAR), CIFAR).relus / 1000
    # 28.672 is printed as 28.6 and as 28.7; ratios as 3.5 or 1.75.
    assert abs(thousands - printed) <= (0.5 if printed == 197 else 0.1)
    assert abs(other / thousands - ratio) <= 0.07


def test_merged_costs_by_hand() -> None:
    """ResNet18: S4 culled is one strided 3x3 of 256 to 512 channels, and its projection is part of it."""
    whole = merged("resnet18", Design(), UNMERGED)
    assert whole == Merged(17, 555_417_600)
    first, equal, projection = 9 * 256 * 512 * 16, 9 * 512 * 512 * 16, 256 * 512 * 16
    design = Design((4,))  # and with it the stem's ReLU, which merges with nothing
    assert merged("resnet18", design, STAGES) == Merged(14, whole.macs - 3 * equal - projection)
    assert first > projection
    # A thinned first block of S2 is a strided 3x3 of 64 to 128 channels, the second one of 128 to 128.
    saved = 2 * 9 * 128 * 128 * 256 + 64 * 128 * 256
    assert merged("resnet18", Design(thinned=(2,)), BLOCKS) == Merged(15, whole.macs - saved)


def test_depthwise_pairs_are_not_merged_where_that_costs_more() -> None:
    plain = count(base("mobilenetv1"), CIFAR)
    # The stem takes in the depthwise convolution behind it: one 3x3 of 3 to 32 channels. No other pair gets cheaper.
    assert merged("mobilenetv1", Design(thinned=(1, 2, 3, 4, 5)), BLOCKS) == Merged(26, plain.macs - 9 * 32 * 1024)


@pytest.mark.parametrize("merging", [UNMERGED, STAGES, BLOCKS, TABLE_8])
@pytest.mark.parametrize(
    "name", fast_first(["resnet9", "resnet10", "resnet18", "resnet20", "vgg16-avg", "mobilenetv1"])
)
def test_nothing_dropped_merges_nothing(name: str, merging: Merging) -> None:
    model = base(name, 0.25)
    found = merged_cost(model, CIFAR, (), merging)
    assert found.macs == count(model, CIFAR).macs
    assert found.convs == len({site.conv for site in relu_sites(model, CIFAR)})


def test_a_foreign_relu_is_named() -> None:
    with pytest.raises(ShoalError, match="found no ReLU 'nope'"):
        merged_cost(base("resnet10", 0.25), CIFAR, ("nope",), BLOCKS)


@pytest.mark.parametrize(("name", "stage"), [("resnet10", 4), ("resnet20", 3), ("vgg16-avg", 5), ("mobilenetv1", 5)])
def test_a_culled_last_stage_folds_to_one_linear_layer(name: str, stage: int) -> None:
    torch.manual_seed(1)
    model = randomise(build(name, 10, width=0.25))
    names = [site.name for site in relu_sites(model, CIFAR) if site.stage == stage]
    before = trace(drop_relus(model, names), CIFAR)
    after, images = fold(before), torch.randn(4, *CIFAR)
    assert torch.allclose(before(images)[-1], after(images)[-1], rtol=1e-4, atol=1e-4)
    cut, whole = cost(after), cost(before)
    assert cut.macs + cut.linear_macs < whole.macs + whole.linear_macs
    assert cut.depth < whole.depth
    assert [node.op for node in after.nodes[-2:]] == ["flatten", "linear"]
    assert [(n.name, n.op) for n in fold(after).nodes] == [(n.name, n.op) for n in after.nodes]
    assert fold(after)(images)[-1].equal(after(images)[-1])


def test_a_tail_that_would_cost_more_stays() -> None:
    model = randomise(build("resnet10", 10, width=0.25))
    ops = [node.op for node in fold(trace(model, CIFAR)).nodes]
    assert ops[-4:] == ["relu", "mean", "flatten", "linear"]


def test_dropped_blocks_and_layers_do_not_mix_up_names() -> None:
    model = base("resnet18", 0.25)
    blocks, relus = drops(Design((1,), (2, 3, 4), one_block=True), model, CIFAR)
    assert blocks == ("layer2.1.relu1", "layer3.1.relu1", "layer4.1.relu1")
    assert not set(relus) & set(blocks)
    assert count(drop_relus(drop_blocks(model, CIFAR, blocks), relus), CIFAR).relus == 57_344 // 4
