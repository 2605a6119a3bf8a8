"""Fixed point, Program and the clear executor: exact mod 2^64, and within the stated bound of the float graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.graph.ops import Node
from shoal.models import build
from shoal.private.compiler.compilation import compile
from shoal.private.program.clear import ring_products, run_clear
from shoal.private.program.fixed import PRODUCT_BITS, FixedPoint
from shoal.private.program.program import Program, Weights
from shoal.private.program.steps import LINEAR, OPS, Step
from shoal.surgery.tracing import trace

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """Every operation of the format, two exits, a residual sum, no batch normalisation."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.a = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.relu2 = nn.ReLU()
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)
        self.relu3 = nn.ReLU()
        self.down = nn.Conv2d(16, 8, 3, stride=2, padding=1)
        self.early = nn.Linear(8, 4)
        self.pool = nn.AvgPool2d(2)
        self.last = nn.Linear(16 * 4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.relu1(self.stem(x))
        y = self.relu3(self.b(self.relu2(self.a(x))) + x)
        early = self.early((y - x).mean((2, 3)))
        short = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 0))
        short = torch.cat([short[:, 1:], short[:, :1]], 1)
        z = torch.cat([self.down(torch.cat([x, y], 1)), short], 1)
        return early, self.last(self.pool(z).flatten(1))


def net(seed: int = 0, groups: int = 1) -> Graph:
    torch.manual_seed(seed)
    return trace(Net(groups).eval(), SHAPE)


def images(count: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def masked(graph: Graph, site: str, mask: Tensor) -> Graph:
    return replace(graph, weights=graph.weights | {f"{site}.mask": mask})


def half_mask(graph: Graph, site: str) -> Tensor:
    return torch.rand(graph[site].shape, generator=torch.Generator().manual_seed(2)) < 0.5


@pytest.fixture(scope="module")
def compiled() -> tuple[Program, Weights]:
    graph = net()
    return compile(masked(graph, "relu2", half_mask(graph, "relu2")), images())


# --- hand-computed steps ---------------------------------------------------------------------------------------


def tiny(step: Step, shape: tuple[int, ...], **keep: list[int]) -> Program:
    positions = {name: np.array(p, np.int32) for name, p in keep.items()}
    return Program("shoal-program-1", 4, 64, "x", shape, (step,), (step.name,), positions, {}, 0.0, {})


def ran(program: Program, x: list[Any], **arrays: list[Any]) -> list[Any]:
    weights = Weights({f"s.{k}": np.array(v, np.int64) for k, v in arrays.items()})
    (y,) = run_clear(program, weights, np.array(x, np.int64))
    return (y * 16).tolist()


def test_linear_by_hand() -> None:
    # (24 * 8 + -16 * 3) >> 4 = 9, + 5; (-24 + 0) >> 4 = -2 (down, not to zero), - 1.
    program = tiny(Step("s", "linear", ("x",), (2,)), (2,))
    assert ran(program, [[24, -16]], weight=[[8, 3], [-1, 0]], bias=[5, -1]) == [[14, -3]]


def test_relu_keeps_the_untouched_positions() -> None:
    step = Step("s", "relu", ("x",), (1, 2, 2))
    assert ran(tiny(step, (1, 2, 2)), [[[[-1, 2], [-3, -4]]]]) == [[[[0, 2], [0, 0]]]]
    assert ran(tiny(step, (1, 2, 2), s=[0, 3]), [[[[-1, 2], [-3, -4]]]]) == [[[[0, 2], [-3, 0]]]]


def test_pools_by_hand() -> None:
    # round(16 / 6) = 3: (-6 * 3) >> 4 = -2 and (-2 * 3) >> 4 = -1.
    pool = Step("s", "avg_pool2d", ("x",), (1, 1, 2), {"kernel": [1, 6], "stride": [1, 1]})
    assert ran(tiny(pool, (1, 1, 7)), [[[[1, 2, 7, -19, 3, 0, 5]]]]) == [[[[-2, -1]]]]
    mean = Step("s", "mean", ("x",), (1,), {"keepdim": False})
    assert ran(tiny(mean, (1, 2, 2)), [[[[1, 2], [7, -1]]]]) == [[2]]


def test_moves_by_hand() -> None:
    x = [[[[1, 2], [3, 4]]]]
    assert ran(tiny(Step("s", "pad", ("x",), (1, 2, 3), {"pads": [1, 0]}), (1, 2, 2)), x) == [[[[0, 1, 2], [0, 3, 4]]]]
    assert ran(tiny(Step("s", "subsample", ("x",), (1, 1, 2), {"stride": [2, 1]}), (1, 2, 2)), x) == [[[[1, 2]]]]
    assert ran(tiny(Step("s", "concat", ("x", "x"), (2, 2, 2)), (1, 2, 2)), x) == [[x[0][0], x[0][0]]]
    shifted = Step("s", "take", ("x",), (1, 3, 1), {"index": [None, [1, 0, 1], [1]]})
    assert ran(tiny(shifted, (1, 2, 2)), x) == [[[[4], [2], [4]]]]
    assert ran(tiny(Step("s", "sub", ("x", "x"), (1, 2, 2)), (1, 2, 2)), x) == [[[[0, 0], [0, 0]]]]
    assert ran(tiny(Step("s", "add", ("x", "x"), (1, 2, 2)), (1, 2, 2)), x) == [[[[2, 4], [6, 8]]]]


def test_add_wraps() -> None:
    (y,) = run_clear(tiny(Step("s", "add", ("x", "x"), (1,)), (1,)), Weights({}), np.array([[2**62]]))
    assert (y * 16).tolist() == [[-(2.0**63)]]


def test_noise_is_minus_one_to_plus_one() -> None:
    program = tiny(Step("s", "linear", ("x",), (1,)), (1,))
    weights = Weights({"s.weight": np.array([[16]]), "s.bias": np.array([0])})
    (y,) = run_clear(program, weights, np.full((20_000, 1), 7), noise=np.random.default_rng(0))
    values, counts = np.unique(y * 16, return_counts=True)
    assert values.tolist() == [6, 7, 8]
    np.testing.assert_allclose(counts / counts.sum(), [0.25, 0.5, 0.25], atol=0.02)


# --- against the float graph -----------------------------------------------------------------------------------


def test_the_test_net_has_every_operation() -> None:
    assert {node.op for node in net()} == {"input", *OPS}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [None, 12])
def test_clear_is_within_its_bound_of_float(seed: int, bits: int | None) -> None:
    graph = net(seed, groups=1 + seed % 2)
    graph = masked(graph, "relu2", half_mask(graph, "relu2"))
    program, weights = compile(graph, images(64), fraction_bits=bits)
    fresh = images(48, seed=9)
    for noise in (None, np.random.default_rng(3)):
        for exact, logits in zip(graph(fresh), run_clear(program, weights, fresh, noise=noise, batch=20), strict=True):
            assert np.abs(exact.detach().numpy() - logits).max() <= program.error_bound
    assert 0 < program.error_bound < 0.2
    assert bits is None or program.fraction_bits == bits


def test_encoded_images_and_batches_change_nothing(compiled: tuple[Program, Weights]) -> None:
    program, weights = compiled
    encoded = FixedPoint(program.fraction_bits).encode(images())
    for a, b in zip(run_clear(program, weights, images()), run_clear(program, weights, encoded, batch=3), strict=True):
        np.testing.assert_array_equal(a, b)


def test_full_mask_is_relu_and_empty_mask_is_identity() -> None:
    graph = net()
    full = masked(graph, "relu2", torch.ones(graph["relu2"].shape, dtype=torch.bool))
    assert compile(full, images())[0] == compile(graph, images())[0]
    empty = masked(graph, "relu2", ~full.weights["relu2.mask"])
    program, weights = compile(empty, images())
    assert "relu2" not in {step.name for step in program.steps} | program.keep.keys() | program.ranges.keys()
    assert next(step for step in program.steps if step.name == "b").inputs == ("a",)
    for exact, logits in zip(empty(images()), run_clear(program, weights, images()), strict=True):
        assert np.abs(exact.detach().numpy() - logits).max() <= program.error_bound


def test_empty_masks_in_a_row_and_at_the_output() -> None:
    nodes = (
        Node("x", "input", (), (2,)),
        Node("fc", "linear", ("x",), (2,)),
        Node("r1", "relu", ("fc",), (2,)),
        Node("r2", "relu", ("r1",), (2,)),
    )
    none = torch.zeros(2, dtype=torch.bool)
    graph = Graph(nodes, {"fc.weight": torch.eye(2), "r1.mask": none, "r2.mask": none}, ("r2",))
    program, weights = compile(graph, torch.tensor([[1.0, -1.0]]))
    assert program.outputs == ("fc",)
    assert run_clear(program, weights, torch.tensor([[1.0, -1.0]]))[0].tolist() == [[1.0, -1.0]]


def test_keep_holds_the_mask_s_positions(compiled: tuple[Program, Weights]) -> None:
    mask = half_mask(net(), "relu2").flatten().numpy()
    positions = compiled[0].keep["relu2"]
    assert positions.dtype == np.int32
    assert positions.tolist() == np.flatnonzero(mask).tolist()
    assert list(compiled[0].keep) == ["relu2"]


def test_unused_nodes_vanish() -> None:
    graph = net()
    program, weights = compile(replace(graph, outputs=graph.outputs[:1]), images())
    assert "down" not in {step.name for step in program.steps}
    assert not any(name.startswith("down") for name in weights.arrays)


def test_fraction_bits_are_the_most_that_fit() -> None:
    wide = net()
    most = compile(wide, images())[0]
    # As many as leave every product one limb; 16 leave every sign one gate, and up to 18 would fit.
    assert most.fraction_bits == 15
    for name, product in ring_products(most, compile(wide, images())[1]).items():
        assert name not in most.exact or product.parts[0][2] << most.exact[name] - 1 <= 1 << 53
    assert max(compile(wide, images(), fraction_bits=16)[0].sign_bits.values()) == 20
    assert max(compile(wide, images(), fraction_bits=17)[0].sign_bits.values()) == 21
    wide.weights["a.bias"][0] = 200.0  # 200 * 2^16 < 2^24, and the activations (800 with margin) want 14 bits
    assert compile(wide, images())[0].fraction_bits == 14
    assert compile(wide, images(), fraction_bits=16)[0].fraction_bits == 16
    wide.weights["a.bias"][0] = 4000.0  # below 12 bits comfort yields, and only the bias decides
    assert compile(wide, images())[0].fraction_bits == 12


def test_error_bound_is_four_times_the_worst_seen() -> None:
    graph = net()
    program, weights = compile(graph, images(), fraction_bits=8)
    private = run_clear(program, weights, images(), noise=np.random.default_rng(0))
    gaps = [np.abs(a.numpy() - b).max() for a, b in zip(graph(images()), private, strict=True)]
    assert program.error_bound == pytest.approx(4 * max(gaps))


def test_activations_stay_below_31_bits() -> None:
    nodes = (Node("x", "input", (), (4096,)), Node("fc", "linear", ("x",), (1,)))
    graph = Graph(nodes, {"fc.weight": torch.full((1, 4096), 60.0)}, ("fc",))
    x = torch.full((1, 4096), 15.0)
    # 4096 * 60 * 15 * 2^9 < 2^31 < 4096 * 60 * 15 * 2^10.
    assert compile(graph, x, margin=1.0)[0].fraction_bits == 9
    with pytest.raises(ShoalError, match="at fc with 10 fraction bits"):
        compile(graph, x, margin=1.0, fraction_bits=10)


def test_run_clear_refuses_what_does_not_fit(compiled: tuple[Program, Weights]) -> None:
    program, weights = compiled
    for bad, message in (
        (torch.zeros(1, 3, 9, 9), "found images of shape"),
        (images()[:0], "N >= 1"),
        (images().to(torch.uint8), "uint8"),
        (images() * float("nan"), "NaN or infinity in the images"),
    ):
        with pytest.raises(ShoalError, match=message):
            run_clear(program, weights, bad)
    fewer = Weights({k: v for k, v in weights.arrays.items() if k != "a.bias"})
    with pytest.raises(ShoalError, match=r"found shape None at a.bias; need \(8,\)"):
        run_clear(program, fewer, images())
    other = Weights(weights.arrays | {"a.weight": np.zeros((8, 8, 5, 5), np.int64)})
    with pytest.raises(ShoalError, match=r"found shape \(8, 8, 5, 5\) at a.weight"):
        run_clear(program, other, images())


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "wrn-16-4", "vgg16-avg", "mobilenetv2"])
def test_every_linear_layer_is_exact_in_a_ring_that_seal_can_multiply_in(name: str) -> None:
    torch.manual_seed(0)
    graph = fold(trace(build(name, 4, width=0.125).eval(), (3, 32, 32)))
    program, _ = compile(graph, torch.rand(4, 3, 32, 32))
    linear = [step.name for step in program.steps if step.op in LINEAR]
    assert linear
    assert all(program.exact[name] <= PRODUCT_BITS for name in linear)
