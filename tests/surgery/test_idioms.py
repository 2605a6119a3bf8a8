"""Laws over forms: however an operation is written, the Graph computes what PyTorch does, or calls it unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.private.compiler.compilation import compile
from shoal.private.compiler.refusal import refusals
from shoal.private.program.clear import run_clear
from shoal.surgery.normal_form import normalise
from shoal.surgery.sites import find_blocks
from shoal.surgery.substitution import parse, substitute
from shoal.surgery.tracing import check_trace, count, trace
from tests.conftest import randomise

SHAPE = (4, 6, 8)
Function = Callable[[Tensor], Tensor]


class Call(nn.Module):
    """A forward pass that is one function, of a convolution's result; attributes of its own to compute with."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 4, 1), function
        self.scalar, self.channel = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("known", torch.rand(1, 4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.conv(x))


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


def in_turn(x: Tensor) -> Tensor:
    a, b = torch.split(x, [1, 3], dim=1)
    return torch.cat([b, a], -3)


def changed_in_place(x: Tensor) -> Tensor:
    y = F.relu(x, inplace=True)
    return x + y  # twice the ReLU


def added_in_place(x: Tensor) -> Tensor:
    y = x.add_(1.0)
    return y.mul(2.0) - x


SAME: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "times a number": lambda m, x: 0.3 * x,
    "over a number": lambda m, x: x / 4,
    "minus a number": lambda m, x: x - 0.7,
    "a number minus": lambda m, x: 0.7 - x,
    "negated": lambda m, x: -x,
    "sum of a list": lambda m, x: sum([x, x, x]),
    "scalar parameter": lambda m, x: x * m.scalar + m.scalar,
    "parameter a channel": lambda m, x: m.channel * x + m.channel,
    "buffers": lambda m, x: (x - m.known) / m.known + m.known,
    "a buffer minus": lambda m, x: m.known - x,
    "chunk": lambda m, x: x.chunk(2, 1)[1] - x.chunk(2, dim=1)[0],
    "split": lambda m, x: in_turn(x),
    "split from behind": lambda m, x: x.split(3, -3)[-1],
    "channel slice": lambda m, x: torch.cat([x[:, 1:], x[:, :1]], dim=1),
    "every other channel": lambda m, x: x[:, ::2],
    "rows and columns": lambda m, x: x[:, :, 1:-1, 2:],
    "strides": lambda m, x: x[:, :, ::2, ::3],
    "shuffle by view": lambda m, x: shuffled(x, 2),
    "shuffle": lambda m, x: F.channel_shuffle(x, 2),
    "zero padding": lambda m, x: F.pad(x, (1, 2, 0, 1)),
    "average with padding": lambda m, x: F.avg_pool2d(x, 3, stride=2, padding=1),
    "ceil_mode that adds nothing": lambda m, x: F.avg_pool2d(x, 2, ceil_mode=True),
    "adaptive": lambda m, x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive, overlapping": lambda m, x: F.adaptive_avg_pool2d(x, (5, 7)),
    "adaptive, enlarging": lambda m, x: F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(x, 1), 7),
    "adaptive, uneven": lambda m, x: F.adaptive_avg_pool2d(x, (4, 5)),
    "adaptive, uneven and enlarging": lambda m, x: F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(x, 2), (7, 5)),
    "adaptive maximum, uneven": lambda m, x: F.adaptive_max_pool2d(x, (4, 5)),
    "adaptive, one side": lambda m, x: F.adaptive_avg_pool2d(x, (None, 4)),
    "adaptive maximum": lambda m, x: F.adaptive_max_pool2d(x, (3, 1)),
    "mean in turn": lambda m, x: x.mean(3).mean(2),
    "mean in turn, rows first": lambda m, x: x.mean(2).mean(-1),
    "squeezed": lambda m, x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1),
    "squeezed at once": lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze((2, 3)),
    "indexed": lambda m, x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0],
    "clamped": lambda m, x: x.clamp(min=0),
    "dropped": lambda m, x: F.dropout2d(x, 0.5, m.training),
    "copied": lambda m, x: x.contiguous().clone(),
    "changed in place": lambda m, x: changed_in_place(x),
    "added in place": lambda m, x: added_in_place(x),
}


@pytest.mark.parametrize("form", SAME)
def test_a_form_is_what_pytorch_computes_in_every_reading(form: str) -> None:
    torch.manual_seed(4)
    model, x = Call(SAME[form]).eval(), torch.randn(3, *SHAPE)
    truth = model(x).detach()
    assert (normalise(model)(x) - truth).abs().max() < 1e-5
    graph = trace(model, SHAPE)
    assert not cost(graph).unknown
    assert graph(x)[0].shape == truth.shape
    assert (graph(x)[0] - truth).abs().max() < 1e-5
    folded = fold(graph)
    assert (folded(x)[0] - truth).abs().max() < 1e-4
    assert fold(folded).nodes == folded.nodes
    program, weights = compile(folded, x)
    assert np.abs(run_clear(program, weights, x)[0] - truth.numpy()).max() <= program.error_bound


def test_constants_that_are_parameters_are_counted_as_such() -> None:
    sizes = {"scalar parameter": 1, "parameter a channel": 4, "buffers": 0, "times a number": 0}
    assert {form: count(Call(SAME[form]), SHAPE).params - 20 for form in sizes} == sizes


def flat(*layers: nn.Module) -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers))


@pytest.mark.parametrize(
    ("layers", "left"),
    [
        ((nn.Linear(4, 6), nn.BatchNorm1d(6)), ["linear"]),
        ((nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3, bias=False)), ["linear", "relu", "linear"]),
        ((nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 3)), ["relu", "linear"]),
    ],
)
def test_batch_norms_of_flat_features_fold_into_linear_layers(layers: tuple[nn.Module, ...], left: list[str]) -> None:
    model, x = flat(*layers), torch.randn(3, *SHAPE)
    graph = fold(trace(model, SHAPE))
    assert [n.op for n in graph][4:] == left
    assert (graph(x)[0] - model(x)).abs().max() < 1e-4
    assert fold(graph).nodes == graph.nodes


def test_a_batch_norm_that_nothing_can_take_in_is_refused() -> None:
    with pytest.raises(ShoalError, match="found batch_norm at 4; need a graph without batch normalisation"):
        compile(fold(trace(flat(nn.ReLU(), nn.BatchNorm1d(4)), SHAPE)), torch.randn(2, *SHAPE))


UNKNOWN: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "product": (lambda m, x: x * x, "found mul of values of shapes .* need no gate"),
    "gate": (lambda m, x: x * x.mean((2, 3), keepdim=True), "found mul of values of shapes"),
    "broadcast sum": (lambda m, x: x + x.mean((2, 3), keepdim=True), "found add of values of shapes"),
    "a number over": (lambda m, x: 1 / x, "found div with something other than a number"),
    "squeeze": (lambda m, x: x[:, :, :1].squeeze(), r"found squeeze at squeeze .*; need .* flatten\(1\)"),
    "mean of channels": (lambda m, x: x.mean(1), "found mean"),
    "chunk of rows": (lambda m, x: x.chunk(2, 2)[0], "found chunk along a dimension other"),
    "a channel": (lambda m, x: x[:, 0], r"found indexing"),
    "counted inside": (
        lambda m, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        "found avg_pool2d with padding and count_include_pad=False at .*; need count_include_pad=True",
    ),
    "windows beyond": (lambda m, x: F.avg_pool2d(x, 3, 2, ceil_mode=True), "found avg_pool2d with ceil_mode where"),
    "divisor": (lambda m, x: F.avg_pool2d(x, 2, divisor_override=3), "found avg_pool2d with divisor_override"),
    "cropped and padded": (lambda m, x: F.pad(x, (-1, 1)), "found pad with a negative amount"),
    "sigmoid": (lambda m, x: torch.sigmoid(x) + x, r"found sigmoid at sigmoid \(test_idioms.py:\d+\); need no gate"),
    "sigmoid at the end": (lambda m, x: torch.sigmoid(x), "found sigmoid at sigmoid .*; need logits"),
    "softmax": (lambda m, x: F.log_softmax(x.mean((2, 3)), dim=1), "found log_softmax at .*; need logits"),
    "leaky": (lambda m, x: F.leaky_relu(x, 0.1), "found leaky_relu at .* --replace leaky_relu=relu"),
    "ReLU6": (lambda m, x: F.relu6(x), "found relu6 at relu6; need ReLU, .* --replace relu6=relu"),
    "clamped to six": (lambda m, x: x.clamp(0, 6), "found relu6 at clamp"),
    "clamped to one": (lambda m, x: x.clamp(0, 1), "found clamp to .0, 1. at clamp .*; need ReLU, clamp"),
    "other shuffle": (lambda m, x: x.view(-1, 2, 2, 6, 8).transpose(1, 3).reshape(-1, 4, 6, 8), "found reshape to"),
}


@pytest.mark.parametrize("form", UNKNOWN)
def test_what_has_no_private_form_is_refused_by_name(form: str) -> None:
    function, message = UNKNOWN[form]
    model, x = Call(function).eval(), torch.randn(2, *SHAPE)
    assert torch.equal(normalise(model)(x), model(x))
    with pytest.raises(ShoalError, match=message):
        compile(fold(trace(model, SHAPE)), x)


def test_relu6_is_counted_as_two_comparisons_and_trained_as_it_is() -> None:
    model, x = nn.Sequential(nn.ReLU6(), nn.Hardtanh(0, 6)), 10 * torch.randn(2, *SHAPE)
    found = count(model, SHAPE)
    assert (found.relus, found.comparisons) == (0, 2 * 2 * 4 * 6 * 8)
    assert torch.equal(trace(model, SHAPE)(x)[0], x.clamp(0, 6))
    assert torch.equal(normalise(model)(x), x.clamp(0, 6))


# ---------------------------------------------------------------- exchanging layers


class Odd(nn.Module):
    """One SiLU module called twice, functional ReLU6 and max pool, a module pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(inplace=True)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(self.act(self.conv(x))))
        return F.max_pool2d(F.relu6(self.pool(x)), 2).flatten(1)


class Replaced(Odd):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(F.relu(self.conv(x))))
        return F.avg_pool2d(F.relu(F.avg_pool2d(x, 3, 2, 1)), 2).flatten(1)


def test_layers_are_exchanged_on_request() -> None:
    torch.manual_seed(0)
    model, plain, x = Odd(), Replaced(), torch.randn(2, *SHAPE)
    plain.load_state_dict(model.state_dict())
    before = model(x)
    changed = substitute(model, {"silu": "relu", "relu6": "relu", "max_pool": "avg_pool"})
    assert torch.equal(changed(x), plain(x))
    assert torch.equal(model(x), before)
    assert set(changed.state_dict()) == set(model.state_dict())
    assert not refusals(fold(trace(changed, SHAPE)))
    only = substitute(model, {"max_pool": "avg_pool"})
    assert [r.found for r in refusals(fold(trace(only, SHAPE)))] == ["SiLU", "SiLU", "relu6"]


def test_what_cannot_be_exchanged_is_an_error() -> None:
    for choices, message in (
        ({"gelu": "relu"}, "found no gelu in the model"),
        ({"silu": "tanh"}, "found 'silu=tanh' to replace; need some of relu6=relu"),
        ({"sigmoid": "relu"}, "found 'sigmoid=relu'"),
    ):
        with pytest.raises(ShoalError, match=message):
            substitute(Odd(), choices)
    with pytest.raises(ShoalError, match="max pool with ceil_mode at 0; need whole windows"):
        substitute(nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True)), {"max_pool": "avg_pool"})
    with pytest.raises(ShoalError, match="with dilation or indices"):
        substitute(nn.Sequential(nn.MaxPool2d(2, dilation=2)), {"max_pool": "avg_pool"})
    assert parse(["relu6=relu,silu=relu", "max_pool=avg_pool"]) == {
        "relu6": "relu",
        "silu": "relu",
        "max_pool": "avg_pool",
    }


class ActivatedNorm(nn.BatchNorm2d):
    """A batch norm with dropout and an activation, whose forward calls the function, as timm's does."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        training = self.training or self.running_mean is None
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.1, self.eps)
        return self.act(self.drop(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_functional_batch_norm_follows_train_and_eval(training: bool) -> None:
    torch.manual_seed(1)
    layers = [nn.Conv2d(4, 4, 3, padding=1), ActivatedNorm(4), nn.Conv2d(4, 4, 3, padding=1), ActivatedNorm(4)]
    model = randomise(nn.Sequential(*layers, nn.Dropout(0.2), nn.Conv2d(4, 2, 3, padding=1))).train(training)
    traced, x = normalise(model), torch.randn(5, *SHAPE)
    assert set(traced.state_dict()) == set(model.state_dict())
    assert traced.training == training
    assert (traced.eval()(x) - model.eval()(x)).abs().max() < 1e-5
    for network in (traced.train(), model.train()):
        torch.manual_seed(3)
        network(x)
    after = zip(traced.state_dict().items(), model.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b) for (name, a), b in after if "num_batches" not in name)
    assert (fold(trace(traced, SHAPE))(x)[0] - model.eval()(x)).abs().max() < 1e-4
    assert [block.name for block in find_blocks(model, SHAPE)] == ["3.act"]


class Auxiliary(nn.Module):
    """Two results in training, one in inference, and a noisy path in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc, self.aux = nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = F.dropout(self.b(self.a(x)), 0.5, self.training).mean((2, 3))
        return (self.fc(h), self.aux(h)) if self.training else self.fc(h)


def test_a_network_is_traced_as_it_is_in_inference() -> None:
    torch.manual_seed(2)
    model, x = Auxiliary().train(), torch.randn(3, *SHAPE)
    traced = normalise(model)
    assert traced.training
    assert model.training
    assert len(trace(model, SHAPE).outputs) == 1
    assert not torch.equal(traced(x), traced(x)), "dropout trains"
    assert torch.equal(traced.eval()(x), model.eval()(x))
    check_trace(model, SHAPE)


class Alias(nn.Module):
    """Changes a value in place that it reads again under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.idle = nn.Conv2d(4, 4, 3, padding=1), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        other = self.idle(x)
        return (self.conv(F.relu_(x)) + other).mean((2, 3))


class Normalising(nn.Module):
    """Changes its images in place, which is nobody else's business."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x.sub_(0.5).div_(2.0))).mean((2, 3))


def test_a_trace_is_compared_before_it_is_trusted() -> None:
    with pytest.raises(ShoalError, match="Alias computes something else once traced"):
        check_trace(Alias(), SHAPE)
    check_trace(Normalising(), SHAPE)
