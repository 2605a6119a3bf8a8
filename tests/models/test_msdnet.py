"""MSDNet: the published settings' counts as integers, its laws at any size, and its exits as networks of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shoal.exits.classifiers import keep_exit
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.models import build
from shoal.outputs import forward
from shoal.private.compiler.deployment import clear_agreement, deploy
from shoal.surgery.tracing import count, trace
from tests.conftest import blobs, randomise

CIFAR = (3, 32, 32)

# name, classes, parameters and multiply-adds (convolutions and linear layers) up to and with each classifier
TABLE = [
    (
        "msdnet-7",
        100,
        (433_876, 876_792, 1_274_952, 1_695_548, 2_178_352, 2_603_252, 3_067_960),
        (14_967_296, 25_259_008, 36_780_544, 45_972_480, 56_933_888, 66_529_280, 75_487_744),
    ),
    (
        "msdnet-7",
        10,
        (422_266, 853_572, 1_240_122, 1_649_108, 2_120_302, 2_533_592, 2_986_690),
        (14_955_776, 25_235_968, 36_745_984, 45_926_400, 56_876_288, 66_460_160, 75_407_104),
    ),
    (
        "msdnet-5",
        100,
        (299_704, 649_740, 1_018_308, 1_492_424, 2_078_924),
        (6_792_704, 14_209_024, 27_278_848, 41_373_696, 58_087_936),
    ),
    (
        "msdnet-5",
        10,
        (288_094, 626_520, 983_478, 1_445_984, 2_020_874),
        (6_781_184, 14_185_984, 27_244_288, 41_327_616, 58_030_336),
    ),
]


def until(name: str, block: int) -> bool:
    """Whether a layer belongs to the blocks and classifiers up to `block`, counted from 0."""
    room, _, rest = name.partition(".")
    return room == "first" or int(rest.partition(".")[0]) <= block


@pytest.mark.parametrize(("name", "classes", "params", "macs"), TABLE)
def test_published_counts(name: str, classes: int, params: tuple[int, ...], macs: tuple[int, ...]) -> None:
    model = build(name, classes)
    total = count(model, CIFAR)
    rows = [row for row in total.rows if row.macs + row.linear_macs]
    assert total.unknown == ()
    assert total.params == sum(p.numel() for p in model.parameters()) == params[-1]
    for block in range(len(params)):
        assert sum(r.macs + r.linear_macs for r in rows if until(r.name, block)) == macs[block]
        assert sum(p.numel() for n, p in model.named_parameters() if until(n, block)) == params[block]


def test_scales_end_at_a_third_and_two_thirds() -> None:
    """Layers 1 to 6 have three scales, 7 to 12 two, 13 to 16 one; a transition halves the channels at 7 and 13."""
    modules = dict(build("msdnet-7", 10).named_modules())
    kinds = [(type(m).__name__, len(m.scales)) for m in modules.values() if hasattr(m, "scales")]
    layers = [n for kind, n in kinds if kind == "Layer"]
    assert layers == [3] * 6 + [2] * 6 + [1] * 4
    assert [n for kind, n in kinds if kind == "Transition"] == [2, 1]
    fc = modules["classifiers.6.units.0.conv"]
    assert isinstance(fc, nn.Conv2d)
    assert fc.in_channels == 4 * (((16 + 7 * 6) // 2 + 6 * 6) // 2 + 3 * 6)


@pytest.mark.parametrize("side", [(28, 28), (33, 17)])
@pytest.mark.parametrize("width", [0.01, 0.5])
def test_any_size_and_width(side: tuple[int, int], width: float) -> None:
    model = build("msdnet-5", 3, channels=1, width=width).eval()
    assert [tuple(z.shape) for z in model(torch.randn(2, 1, *side))] == [(2, 3)] * 5


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return randomise(build("msdnet-5", 4, width=0.25))


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("index", range(5))
def test_each_exit_is_a_network_of_its_own(trained: nn.Module, index: int) -> None:
    own, x = keep_exit(trained, index), images()
    truth = forward(trained, x).logits[index]
    with torch.no_grad():
        assert (own(x) - truth).abs().max() < 1e-5
        folded = fold(trace(own, (3, 16, 16)))
        assert (folded(x)[0] - truth).abs().max() < 1e-4
    assert all(until(name, index) for name in dict(own.named_parameters()))
    if index < 4:
        assert cost(folded).macs < cost(fold(trace(keep_exit(trained, index + 1), (3, 16, 16)))).macs


def test_a_classifier_teaches_nothing_that_comes_after_it(trained: nn.Module) -> None:
    trained.zero_grad()
    forward(trained, images()).logits[1].square().sum().backward()
    touched = {name for name, p in trained.named_parameters() if p.grad is not None}
    assert touched
    assert all(until(name, 1) for name in touched)
    assert not any(name.startswith("classifiers.0.") for name in touched)


@pytest.mark.parametrize("index", [1, None])
def test_exits_run_in_private_arithmetic(index: int | None) -> None:
    """One exit alone, and all of them in one program."""
    data, model = blobs(32), randomise(build("msdnet-5", 4, channels=1, width=0.25))
    graph, program, weights = deploy(model if index is None else keep_exit(model, index), data)
    assert len(program.outputs) == (5 if index is None else 1)
    x = data.normalise(data.test.images)
    agreement, _ = clear_agreement(graph, program, weights, x, data.test.labels)
    assert agreement.max_abs_logit_error < 0.02
    assert agreement.argmax_equal >= len(x) - 1
