"""Laws over what users write in a forward pass: flattening, sizes, padding by name, shared layers, odd results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.networks.adoption import adopt
from shoal.private.compiler.compilation import compile
from shoal.private.compiler.deployment import deploy
from shoal.surgery.normal_form import normalise
from shoal.surgery.tracing import check_trace, count, trace
from shoal.training.evaluation import evaluate
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.conftest import blobs, randomise
from tests.surgery.networks import Named

SHAPE = (1, 8, 8)


class Call(nn.Module):
    """A forward pass that is one function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Flattening(nn.Module):
    """A small CNN whose features [N, 4, 2, 2] meet its linear layer as `form` says."""

    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.form = form
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.form(F.avg_pool2d(torch.relu(self.bn(self.conv(x))), 4)))


def unpacked(x: Tensor) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, c * h * w)


def unpacked_in_part(x: Tensor) -> Tensor:
    b, _, _, _ = x.shape
    return x.view(b, -1)


FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "size": lambda x: x.view(x.size(0), -1),
    "size by name": lambda x: x.view(x.size(dim=0), -1),
    "size from behind": lambda x: x.view(x.size(-4), -1),
    "size()": lambda x: x.view(x.size()[0], -1),
    "shape": lambda x: x.view(x.shape[0], -1),
    "len": lambda x: x.view(len(x), -1),
    "list": lambda x: x.view([x.size(0), -1]),
    "size of another": lambda x: x.view(F.dropout(x, 0.5, False).size(0), -1),
    "product": lambda x: x.view(x.size(0), x.size(1) * x.size(2) * x.size(3)),
    "number": lambda x: x.view(x.shape[0], 16),
    "number of images over 1": lambda x: x.view(x.size(0) // 1, 16),
    "any batch": lambda x: x.view(-1, 16),
    "any batch, product": lambda x: x.view(-1, x.shape[1:].numel()),
    "unpacked": unpacked,
    "unpacked in part": unpacked_in_part,
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "reshape to a tuple": lambda x: x.reshape((x.size(0), -1)),
    "reshape to a sum": lambda x: x.reshape(x.shape[:1] + (-1,)),  # noqa: RUF005
    "torch.reshape": lambda x: torch.reshape(x, (x.size(0), -1)),
    "torch.reshape by name": lambda x: torch.reshape(x, shape=(-1, 16)),
    "torch.flatten": lambda x: torch.flatten(x, 1),
    "flatten": lambda x: x.flatten(start_dim=1),
}


@pytest.mark.parametrize("form", FLAT)
def test_every_way_to_flatten_trains_counts_folds_and_compiles(form: str) -> None:
    model = randomise(Flattening(FLAT[form]))
    x = torch.randn(3, *SHAPE)
    truth = model(x)
    found = count(model, SHAPE)
    assert found.unknown == ()
    assert found.params == sum(p.numel() for p in model.parameters())
    graph = fold(trace(model, SHAPE))
    assert [n.op for n in graph] == ["input", "conv2d", "relu", "avg_pool2d", "flatten", "linear"]
    assert (graph(x)[0] - truth).abs().max() < 1e-4
    assert [s.op for s in compile(graph, x)[0].steps] == [n.op for n in graph][1:]

    traced = normalise(model)
    assert torch.equal(traced(x), truth)
    history = fit(traced, blobs(32), Objective((cross_entropy(),)), Schedule(1, 0.1, batch_size=16))
    assert len(history.rows) == 1


def test_a_view_in_a_network_that_was_never_traced_gets_one_sentence() -> None:
    model, data, objective = Flattening(FLAT["size"]), blobs(32), Objective((cross_entropy(),))
    with pytest.raises(ShoalError, match="view of channels_last images at Flattening; need"):
        fit(model, data, objective, Schedule(1, 0.1))
    with pytest.raises(ShoalError, match="view of channels_last images at Flattening; need"):
        evaluate(model, data, data.test)
    assert len(evaluate(Flattening(FLAT["size"]), data, data.test, Settings(channels_last=False))) == 1


MORE: dict[str, Callable[[Tensor], Tensor]] = {
    "rank 3": lambda x: x.view(x.size(0), 2, -1),
    "rows": lambda x: x.view(-1, 8),
    "two rows an image": lambda x: x.view(x.size(0) * 2, 8),
    "one image": lambda x: x.view(1, -1),
    "channels first": lambda x: x.view(x.size(1), -1),
    "everything": lambda x: x.flatten(),
    "channels into the batch": lambda x: x.reshape(-1, 2, 2, 2),
    "a multiple of the images": lambda x: x.view(x.size(0) * 2 // 1, 8),
}


@pytest.mark.parametrize("form", MORE)
def test_other_reshapes_are_kept_counted_unknown_and_refused_by_name(form: str) -> None:
    model = Call(MORE[form])
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(normalise(model)(x), MORE[form](x))
    graph = trace(model, (4, 2, 2))
    assert len(cost(graph).unknown) == 1
    assert [n.inputs for n in graph] == [(), ("x",)]
    with pytest.raises(
        ShoalError,
        match=r"found (reshape to \(.*which does not only flatten|flatten from 0 to -1) at (view|reshape|flatten)",
    ):
        compile(graph, x)


def test_a_batch_that_is_not_the_images_number_flattens_nothing() -> None:
    """Frames folded into the batch and back: [2N, 2, 2, 2] -> [N, 16] is no flatten of what it reads."""
    model = Call(lambda x: x.reshape(-1, 2, 2, 2).view(x.size(0), -1))
    assert len(count(model, (4, 2, 2)).unknown) == 2
    x = torch.randn(3, 4, 2, 2)
    assert torch.equal(normalise(model)(x), x.flatten(1))


def test_views_as_another_type_stay_views() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(normalise(Call(lambda x: x.view(torch.int32)))(x), x.view(torch.int32))


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "size": lambda x: F.avg_pool2d(x, x.size(3)),
    "sizes": lambda x: F.avg_pool2d(x, x.size()[2:]),
    "shape": lambda x: F.avg_pool2d(x, kernel_size=(x.shape[-2], x.shape[-1])),
    "half": lambda x: F.avg_pool2d(x, x.shape[2] // 2, 2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (x.size(2) // 4, 1)),
}


@pytest.mark.parametrize("form", POOLS)
def test_sizes_as_arguments_are_numbers_in_a_graph(form: str) -> None:
    graph = trace(Call(POOLS[form]), SHAPE)
    x = torch.randn(2, *SHAPE)
    assert [n.op for n in graph] == ["input", "avg_pool2d"]
    assert torch.equal(graph(x)[0], POOLS[form](x))


def test_arguments_that_depend_on_the_batch_are_unknown() -> None:
    forms: list[Callable[[Tensor], Tensor]] = [lambda x: x + x.size(0), lambda x: F.avg_pool2d(x, x.size(0))]
    for form in forms:
        unknown = count(Call(form), SHAPE).unknown
        assert len(unknown) == 1
        assert "an argument computed in forward" in unknown[0]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, (3, 1), (2, 3)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_is_by_number_where_both_sides_are_equal(kernel: Any, dilation: int, padding: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, kernel, padding=padding, dilation=dilation))
    graph = trace(model, (1, 12, 12))
    x = torch.randn(2, 1, 12, 12)
    kernels = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    if padding == "valid" or all(dilation * (k - 1) % 2 == 0 for k in kernels):
        assert (graph(x)[0] - model(x)).abs().max() < 1e-6
    else:
        with pytest.raises(ShoalError, match=r"found Conv2d with padding='same' and an even kernel .* at 0; need"):
            compile(graph, x)


class Using(nn.Module):
    """A layer between two convolutions that are one, and a parameter of the network's own."""

    def __init__(self, layer: nn.Module, unused: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.layer, self.unused = nn.Conv2d(4, 4, 3, padding=1), layer, unused
        self.scale = nn.Parameter(torch.ones(4, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.layer(self.conv(x)) * self.scale)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "PReLU": lambda: nn.PReLU(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm2d without averages": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "uneven padding": lambda: nn.Conv2d(4, 4, 2, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_params_are_those_of_the_network_each_once(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    layer = LAYERS[name]()
    found = count(Using(layer, nn.Linear(9, 9)), (4, 8, 8))
    assert found.params == sum(p.numel() for p in Using(layer).parameters())
    assert found.macs == 2 * 64 * 4 * 36
    graph = trace(Using(layer), (4, 8, 8))
    graph.save(tmp_path)
    assert cost(Graph.load(tmp_path)) == cost(graph)
    assert cost(fold(graph)).params >= found.params - 4


def test_a_layer_called_twice_is_saved_once_and_loads_bit_equal(tmp_path: Path) -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1)
    graph = trace(nn.Sequential(conv, nn.ReLU(), conv), SHAPE)
    graph.save(tmp_path)
    loaded = Graph.load(tmp_path)
    x = torch.randn(2, *SHAPE)
    assert cost(loaded).params == cost(graph).params == 10
    assert torch.equal(loaded(x)[0], graph(x)[0])


RESULTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "dict": (lambda x: {"logits": x}, "a dict"),
    "nothing": (lambda x: None, "nothing"),
    "empty": (lambda x: (), "nothing"),
    "nested": (lambda x: (x, [x, x]), "a list"),
    "dict in a tuple": (lambda x: (x, {"a": x}), "a dict"),
    "missing exit": (lambda x: (x, None), "nothing"),
    "number": (lambda x: 3, "a int"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_that_are_no_logits_get_one_sentence(name: str) -> None:
    function, what = RESULTS[name]
    for act in (normalise, lambda m: trace(m, SHAPE), lambda m: count(m, SHAPE)):
        with pytest.raises(ShoalError, match=rf"found that forward returns {what} at Call; need logits"):
            act(Call(function))


def test_a_size_is_no_logits() -> None:
    with pytest.raises(ShoalError, match="found a size returned"):
        trace(Call(lambda x: x.shape), SHAPE)


def test_a_model_that_fails_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ShoalError, match=r"fails on images of shape \(2, 8, 8\): .*to have 1 channels, but got 2"):
        trace(nn.Sequential(nn.Conv2d(1, 1, 3)), (2, 8, 8))
    assert "Traceback" not in capfd.readouterr().err


def test_a_named_tuple_is_a_tuple_of_classifiers() -> None:
    model, x = Named(), torch.randn(2, 4, 6, 8)
    graph = check_trace(model, (4, 6, 8))
    for found, wanted in zip(graph(x), model(x), strict=True):
        assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [32, "3x8x8", (1, 3, 8, 8), (3, 0, 8), (3, 8), (3.0, 8, 8)])
def test_other_shapes_of_an_image_are_refused(shape: Any) -> None:
    for act in (count, trace, check_trace):
        with pytest.raises(ShoalError, match=r"found .* as the shape of an image; need three numbers above 0"):
            act(nn.Sequential(nn.Conv2d(3, 2, 1)), shape)


@pytest.mark.parametrize("data", ["cifar10", None, [1, 2]])
def test_what_is_no_data_set_is_refused_before_anything_else(data: Any) -> None:
    for act in (adopt, deploy):
        with pytest.raises(ShoalError, match=r"found a .* as data; need a shoal.Dataset; make one with"):
            act(nn.Sequential(nn.Conv2d(3, 2, 1)), data)


def test_a_module_is_no_graph() -> None:
    with pytest.raises(ShoalError, match=r"found a Sequential to fold; need a shoal.Graph"):
        fold(nn.Sequential())  # type: ignore[arg-type]


class Returned(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.what = nn.Conv2d(4, 5, 1), what

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return {"maps": x, "class": x.mean((2, 3)).argmax(1), "everything": x.flatten()}[self.what]


@pytest.mark.parametrize("what", ["maps", "class", "everything"])
def test_results_other_than_one_logit_for_each_class_are_refused(what: str) -> None:
    with pytest.raises(
        ShoalError, match=r"found that forward returns a result of shape .* need one logit for each cla"
    ):
        check_trace(Returned(what), (4, 6, 8))
