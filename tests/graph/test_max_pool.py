"""Max pools as trees of comparisons: the same function in every executor, and costs as stated."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.costs.model import layout_of
from shoal.costs.protocols import delphi, spu_cheetah
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.graph.max_pool import expand_max_pools
from shoal.private.compiler.compilation import compile
from shoal.private.program.clear import run_clear
from shoal.private.program.program import Program
from shoal.private.protocol.layout import Layout
from shoal.private.serving.client import Client
from shoal.private.transport.certs import TLS
from shoal.surgery.tracing import trace
from tests.private.protocol.test_phases import infer
from tests.support.forked import serving
from tests.support.parties import SHAPE, Case, case, seeded

BELOW = -50.0
"""Far below any padding of zeros: a padded pool that looked at the padding would give 0."""


class Pooled(nn.Module):
    """Two max pools (overlapping and padded; plain), a shuffle of halves, and a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.pool2 = nn.MaxPool2d(2)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.pool(self.stem(x)))
        left, right = self.body(x).chunk(2, dim=1)
        x = self.pool2(x - torch.cat([right, left], 1))
        return self.last(x.flatten(1))


def pool_of(kernel: int | tuple[int, int], **options: object) -> tuple[nn.MaxPool2d, Graph]:
    layer = nn.MaxPool2d(kernel, **options)  # type: ignore[arg-type]
    return layer, trace(nn.Sequential(layer), (2, 9, 8))


def below(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 9, 8, generator=torch.Generator().manual_seed(seed)) + BELOW


@settings(max_examples=80)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    share=st.floats(0, 1),
    dilation=st.integers(1, 2),
    ceil_mode=st.booleans(),
)
def test_a_tree_is_the_pool(
    kernel: tuple[int, int], stride: tuple[int, int], share: float, dilation: int, ceil_mode: bool
) -> None:
    if any((k - 1) * dilation >= 8 for k in kernel):
        dilation = 1
    padding = tuple(int(share * (k // 2)) for k in kernel)
    layer, graph = pool_of(kernel, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode)
    tree, x = expand_max_pools(graph), below()
    assert torch.equal(graph(x)[0], layer(x))
    assert (tree(x)[0] - layer(x)).abs().max() < 1e-4
    assert tree.outputs == graph.outputs
    assert cost(tree).relus == cost(graph).comparisons
    assert cost(graph).relus == 0
    assert cost(tree).relu_layers == sum(math.ceil(math.log2(k)) for k in kernel)


@pytest.mark.parametrize(
    ("kernel", "options", "windows", "comparisons"),
    [
        (2, {}, 16, 3 * 16),  # windows side by side: k^2 - 1 each
        (3, {"stride": 3, "ceil_mode": True}, 9, 2 * 9 * 3 + 2 * 9),
        (3, {"stride": 1, "padding": 1}, 72, 2 * 72 + 2 * 72),  # rows' maxima are shared: 2 (k - 1) each
        (3, {"stride": 2, "padding": 1}, 20, 2 * 9 * 4 + 2 * 20),
        (2, {"stride": 4}, 4, 1 * 4 * 2 + 1 * 4),  # rows that no window reads cost nothing
        ((1, 2), {}, 36, 36),
        (1, {"stride": 2}, 20, 0),
    ],
)
def test_hand_counts(kernel: int, options: dict[str, object], windows: int, comparisons: int) -> None:
    _, graph = pool_of(kernel, **options)
    assert math.prod(graph.nodes[-1].shape[1:]) == windows
    assert cost(graph).comparisons == 2 * comparisons


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (2, {}),
        (3, {"stride": 2, "padding": 1}),
        (3, {"stride": 1, "padding": 1}),
        ((4, 3), {"stride": 2, "padding": 1}),
        (5, {"stride": 3, "padding": 2, "ceil_mode": True}),
        (2, {"dilation": 3, "stride": 1, "padding": 1}),
    ],
)
def test_in_fixed_point_a_pool_is_exact(kernel: int, options: dict[str, object]) -> None:
    layer, _ = pool_of(kernel, **options)
    program, weights = compile(trace(nn.Sequential(layer, nn.Flatten()), (2, 9, 8)), below(8))
    x = below(4, seed=5)
    words = np.rint(x.double().numpy() * 2**program.fraction_bits) / 2**program.fraction_bits
    assert (run_clear(program, weights, x)[0] == layer(torch.from_numpy(words)).flatten(1).numpy()).all()


def test_functional_pools_are_pools() -> None:
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(F.max_pool2d(x, 3, 2, 1), kernel_size=2, stride=1, ceil_mode=True)

    graph, x = trace(Functional(), (2, 9, 8)), below()
    assert [n.op for n in graph] == ["input", "max_pool2d", "max_pool2d"]
    assert torch.equal(graph(x)[0], Functional()(x))


def test_a_window_of_padding_alone_is_refused() -> None:
    layer = nn.Sequential(nn.MaxPool2d(2, dilation=2, padding=1))
    with pytest.raises(ShoalError, match="found a window that lies in the padding at 0; need"):
        compile(trace(layer, (1, 1, 1)), torch.randn(1, 1, 1, 1))
    with pytest.raises(
        ShoalError, match=r"found max_pool2d with return_indices at 0; need a max pool that returns only the maxima"
    ):
        compile(trace(nn.Sequential(nn.MaxPool2d(2, return_indices=True)), (1, 4, 4)), torch.randn(1, 1, 4, 4))


# ---------------------------------------------------------------- between two parties


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Case:
    mask = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(5)) < 0.5
    return case(seeded(Pooled), tmp_path_factory.mktemp("pooled"), {"relu": mask})


def test_plans_and_forecasts_have_the_trees(pooled: Case) -> None:
    graph, layout = pooled.graph, Layout(pooled.program)
    assert cost(graph).comparisons == 4 * (2 * 8 * 4 + 2 * 4 * 4) + 4 * 3 * 4
    assert sum(r.count for r in layout.relus.values()) == cost(graph).comparisons + int(
        graph.weights["relu.mask"].sum()
    )
    assert [s.name for s in layout_of(graph).steps] == [s.name for s in layout.steps]
    assert len(layout.relus) == 4 + 1 + 2
    plain = fold(trace(seeded(Pooled), SHAPE))
    assert spu_cheetah(plain) == spu_cheetah(expand_max_pools(plain))
    assert delphi(cost(expand_max_pools(plain))).bytes == 2048 * (cost(plain).relus + cost(plain).comparisons)


def test_a_program_with_pools_is_saved_and_checked(pooled: Case, tmp_path: Path) -> None:
    pooled.program.save(tmp_path)
    assert Program.load(tmp_path) == pooled.program
    text = (tmp_path / "program.json").read_text()
    assert "max_pool" not in text
    broken = Program.load(tmp_path)
    step = next(s for s in broken.steps if s.op == "take")
    step.attrs["index"] = [None, [99], None]
    with pytest.raises(ShoalError, match=f"found take of shapes .* at {step.name}"):
        broken.check()


def test_prepared_by_two_threads_gives_the_clear_logits_bit_for_bit(pooled: Case) -> None:
    """`infer` also compares bytes, messages and latencies with the layout's closed forms."""
    for image in pooled.images[:3].numpy():
        words, shares = np.rint(image / pooled.unit).astype(np.int64), dict[str, np.ndarray]()
        (logits,), _ = infer(pooled, pooled.program, words, shares)
        (clear,) = run_clear(pooled.program, pooled.weights, words[None], shares=shares)
        assert (logits * pooled.unit == clear).all()
        with torch.no_grad():
            truth = pooled.graph(torch.from_numpy(image[None]))[0].numpy()
        assert np.abs(clear - truth).max() <= pooled.program.error_bound


@pytest.mark.slow
@pytest.mark.private
def test_prepared_between_two_processes(pooled: Case, certs: dict[str, TLS], spu: None) -> None:
    with serving(pooled.folder, certs["server"]) as (_, address):
        client = Client(pooled.folder, address, certs["client"])
        client.prepare(2, batch=2)
        with client:
            result = client.query(pooled.images[:2].numpy())
    assert np.abs(result.logits - pooled.truth(2)).max() <= pooled.program.error_bound
    assert result.bytes == 2 * Layout(pooled.program).online.bytes
