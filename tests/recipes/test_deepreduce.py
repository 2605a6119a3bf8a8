"""DeepReDuce's printed ReLU counts from its stated steps, table by table, and its equation 1."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn

from shoal.errors import ShoalError
from shoal.models import build
from shoal.recipes.deepreduce.designs import Design, apply, criticality, grid
from shoal.reduction.dropping import culled, drop_blocks, drop_relus, spare_blocks, thinned
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import count
from tests.support.tables import fast_first, fast_where

CIFAR, TINY = (3, 32, 32), (3, 64, 64)
STAGES = (1, 2, 3, 4)


@lru_cache(maxsize=32)
def base(name: str, width: float, resolution: float) -> nn.Module:
    """Shapes alone, which is all that is counted here."""
    with torch.device("meta"):
        return build(name, 100, width=width, resolution=resolution).eval()


def quarter(name: str) -> nn.Module:
    """One with values, a quarter as wide."""
    torch.manual_seed(0)
    return build(name, 100, width=0.25).eval()


@lru_cache
def relus(name: str, design: Design, shape: tuple[int, int, int] = CIFAR) -> int:
    return count(apply(design, base(name, design.width, design.resolution), shape), shape).relus


def only(*stages: int) -> tuple[int, ...]:
    return tuple(k for k in STAGES if k not in stages)


# Only one stage keeps its ReLUs.
TABLE_1_AND_3 = [
    ("resnet18", CIFAR, (262_144, 131_072, 65_536, 32_768)),
    ("resnet34", CIFAR, (393_216, 262_144, 196_608, 49_152)),
    ("resnet18", TINY, (1_048_576, 524_288, 262_144, 131_072)),
    ("resnet34", TINY, (1_572_864, 1_048_576, 786_432, 196_608)),
]


@pytest.mark.parametrize(("name", "shape", "printed"), fast_first(TABLE_1_AND_3))
def test_tables_1_and_3(name: str, shape: tuple[int, int, int], printed: tuple[int, ...]) -> None:
    assert tuple(relus(name, Design(only(k)), shape) for k in STAGES) == printed


# stages kept, thinned, width, printed in thousands
TABLE_2 = [
    ((2, 3, 4), False, 1.0, 229),
    ((2, 3, 4), True, 1.0, 115),
    ((2, 3, 4), False, 0.5, 115),
    ((2, 3), False, 1.0, 197),
    ((2, 3), True, 1.0, 98),
    ((2, 3), False, 0.5, 98),
    ((3, 4), False, 1.0, 98),
    ((3, 4), True, 1.0, 49),
    ((3, 4), False, 0.5, 49),
]


@pytest.mark.parametrize(("kept", "thin", "width", "printed"), TABLE_2)
def test_table_2(kept: tuple[int, ...], thin: bool, width: float, printed: int) -> None:
    assert round(relus("resnet18", Design(only(*kept), kept if thin else (), width)) / 1000) == printed


# culled, thinned, width, resolution, one block, printed in thousands (truncated where the paper truncates)
TABLE_4 = [
    ((), False, 1.0, 1.0, False, 557.056),
    ((1,), False, 1.0, 1.0, False, 229.376),
    ((1, 4), False, 1.0, 1.0, False, 196.608),
    ((1,), True, 1.0, 1.0, False, 114.688),
    ((1,), True, 0.5, 1.0, False, 57.344),
    ((1, 4), True, 0.5, 1.0, False, 49.152),
    ((1,), True, 1.0, 0.5, False, 28.672),
    # Printed as "Ch. 0.5x", which gives the 49.15K of the row above it; half the feature map gives what is printed.
    ((1, 4), True, 1.0, 0.5, False, 24.576),
    ((1,), True, 0.5, 0.5, False, 14.336),
    ((1, 4), True, 0.5, 0.5, False, 12.288),
    ((1,), True, 0.5, 0.5, True, 7.168),
]
TABLE_5 = [
    ((), False, 1.0, 1.0, False, 2228.224),
    ((1,), False, 1.0, 1.0, False, 917.504),
    ((1,), True, 1.0, 1.0, False, 458.752),
    ((1, 2), False, 1.0, 1.0, False, 393.216),
    ((1,), True, 0.5, 1.0, False, 229.376),
    ((1, 2), True, 1.0, 1.0, False, 196.608),
    ((1,), True, 1.0, 0.5, False, 114.688),
    ((1, 2), True, 0.5, 1.0, False, 98.304),
    ((1,), True, 0.5, 0.5, False, 57.344),
    ((1, 2), True, 1.0, 0.5, False, 49.152),
    ((1,), True, 0.5, 0.5, True, 28.672),
    ((1, 2), True, 0.5, 0.5, False, 24.576),
    ((1, 2), True, 0.5, 0.5, True, 12.288),
]


@pytest.mark.parametrize(
    ("shape", "row"),
    fast_where(lambda row: row[0] == CIFAR, [(CIFAR, row) for row in TABLE_4] + [(TINY, row) for row in TABLE_5]),
    ids=str,
)
def test_tables_4_and_5(
    shape: tuple[int, int, int], row: tuple[tuple[int, ...], bool, float, float, bool, float]
) -> None:
    gone, thin, width, resolution, one_block, printed = row
    kept = tuple(k for k in STAGES if k not in gone)
    design = Design(gone, kept if thin else (), width, resolution, one_block)
    assert relus("resnet18", design, shape) == printed * 1000


# network, culled, thinned, width, resolution, printed; the stem's ReLUs count where nothing is culled
TABLE_7 = [
    ("resnet10", (), (), 0.5, 1.0, 155_648),
    ("resnet18", (1,), (2, 4), 1.0, 1.0, 147_456),
    ("resnet9", (), (), 0.5, 0.5, 30_720),
    ("resnet18", (1,), (2, 3, 4), 1.0, 0.5, 28_672),
    # The label leaves out alpha 0.5: without it there are 98,304.
    ("resnet18", (1, 4), (2, 3), 0.5, 1.0, 49_152),
    # Printed with alpha 0.5, which gives the row above; rho 0.5 gives what is printed.
    ("resnet18", (1, 4), (2, 3), 1.0, 0.5, 24_576),
    # A thinned ResNet10: plain, the printed rho gives 77,824.
    ("resnet10", (), (1, 2, 3, 4), 1.0, 0.5, 47_104),
]


@pytest.mark.parametrize(("name", "gone", "thin", "width", "resolution", "printed"), TABLE_7)
def test_table_7(
    name: str, gone: tuple[int, ...], thin: tuple[int, ...], width: float, resolution: float, printed: int
) -> None:
    assert relus(name, Design(gone, thin, width, resolution)) == printed


@pytest.mark.parametrize(("thin", "printed"), fast_first([((), 221_184), ((2,), 147_456)]))
def test_table_8_relus(thin: tuple[int, ...], printed: int) -> None:
    """ResNet56 with S2 + S3, and with S2 thinned, which the paper prints without saying so."""
    assert relus("resnet56", Design((1,), thin)) == printed


# model, accuracies of Tables 1 and 3 with distillation by stage, printed C_k
EQUATION_1 = [
    ("resnet34", TINY, {1: 39.4, 2: 51.74, 3: 60.83, 4: 54.41}, {1: 0.0, 2: 7.58, 3: 13.44, 4: 10.37}),
    # The paper's ResNet18 figures (6.04, 9.50, 8.02) come out with ReLUs counted twice; the order is the same.
    ("resnet18", TINY, {1: 39.61, 2: 49.44, 3: 54.34, 4: 51.46}, {1: 0.0, 2: 6.34, 3: 9.97, 4: 8.42}),
    ("resnet18", CIFAR, {1: 59.85, 2: 68.79, 3: 69.92, 4: 63.16}, {1: 0.0, 2: 6.35, 3: 7.51, 4: 2.59}),
]


@pytest.mark.parametrize(("name", "shape", "accuracy", "printed"), EQUATION_1)
def test_equation_1(
    name: str, shape: tuple[int, int, int], accuracy: dict[int, float], printed: dict[int, float]
) -> None:
    found = criticality(accuracy, relu_sites(base(name, 1.0, 1.0), shape))
    assert found == pytest.approx(printed, abs=0.02)


def test_the_grid_never_culls_the_most_critical_stage() -> None:
    designs = grid({1: 0.0, 2: 6.35, 3: 7.51, 4: 2.59})
    assert len(designs) == 5 * 3
    assert [d.culled for d in designs[::5]] == [(1,), (1, 4), (1, 2, 4)]
    assert {d.culled + d.thinned for d in designs[1::5]} == {(1, 2, 3, 4), (1, 4, 2, 3), (1, 2, 4, 3)}
    counts = [relus("resnet18", d) for d in designs[:5]]
    assert counts == [229_376, 114_688, 57_344, 28_672, 14_336]


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet20", "wrn-16-4", "vgg16-avg", "mobilenetv1"])
def test_dropping_keeps_the_rest(name: str) -> None:
    model, x = quarter(name), torch.rand(2, *CIFAR, generator=torch.Generator().manual_seed(0))
    sites = relu_sites(model, CIFAR)
    with torch.no_grad():
        assert (drop_relus(model, ())(x) == model(x)).all()
    left = relu_sites(drop_relus(model, culled(sites, {1}) + thinned(sites, {2})), CIFAR)
    assert not {s.name for s in left} & {s.name for s in sites if s.stage in (0, 1)}
    # Every other ReLU of stage 2 stays, and all of the later stages. (A plain CNN's stages are counted anew.)
    second, later = ([s.name for s in sites if s.stage == 2], [s.name for s in sites if s.stage > 2])
    assert [s.name for s in left] == second[1::2] + later


def test_what_cannot_be_dropped_is_named() -> None:
    model = base("resnet18", 0.25, 1.0)
    sites = relu_sites(model, CIFAR)
    with pytest.raises(ShoalError, match="found no stage 7"):
        culled(sites, {7})
    with pytest.raises(ShoalError, match="found no ReLU 'nope'"):
        drop_relus(model, ["nope"])
    with pytest.raises(ShoalError, match=r"found no residual block 'layer2\.0\.relu1' that keeps its shape"):
        drop_blocks(model, CIFAR, ["layer2.0.relu1"])
    assert spare_blocks(model, CIFAR, {2, 3}) == ("layer2.1.relu1", "layer3.1.relu1")
    with pytest.raises(ShoalError, match="need stages that have ReLUs"):
        criticality({9: 50.0}, sites)


@pytest.mark.parametrize("name", ["resnet34", "resnet56"])
def test_one_block_a_stage_is_one_however_many_there_were(name: str) -> None:
    model = quarter(name)
    stages = {site.stage for site in relu_sites(model, CIFAR)} - {0}
    small = drop_blocks(model, CIFAR, spare_blocks(model, CIFAR, stages))
    left = relu_sites(small, CIFAR)
    assert [site.stage for site in left] == [0, *(stage for stage in sorted(stages) for _ in range(2))]
    assert small.eval()(torch.zeros(1, *CIFAR)).shape == (1, 100)
