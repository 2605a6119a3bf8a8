"""Weights of another training in a module: what is adapted, and what is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.errors import ShoalError
from shoal.networks.adoption import adopt, fit_weights
from shoal.recipes import shallow
from shoal.storage.weight_files import PREFIXES, Weights
from tests.conftest import Residual, blobs, randomise

State = dict[str, Tensor]


def trained() -> Residual:
    torch.manual_seed(7)
    model = randomise(Residual())
    assert isinstance(model, Residual)
    return model


def fitted(state: State) -> tuple[Residual, list[str]]:
    model = Residual()
    notes = fit_weights(model, Weights(state, None, Path("net.pth")))
    return model, notes


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state, []),
        *((prefixed(p), [f"removed the prefix {p!r} of every name"]) for p in PREFIXES),
        (prefixed("module._orig_mod."), ["removed the prefix 'module.'", "removed the prefix '_orig_mod.'"]),
        (lambda state: {k: v.double() for k, v in state.items() if v.is_floating_point()}, ["float64 to float32"]),
        (lambda state: {k: v for k, v in state.items() if "num_batches" not in k}, []),
    ],
)
def test_layouts_that_people_save_give_the_same_network(change: Callable[[State], State], said: list[str]) -> None:
    own, x = trained(), torch.randn(2, 1, 8, 8)
    model, notes = fitted(change(dict(own.state_dict())))
    assert torch.equal(model.eval()(x), own(x))
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))


def test_half_precision_is_converted_and_said() -> None:
    own = trained()
    model, notes = fitted({k: v.half() if v.is_floating_point() else v for k, v in own.state_dict().items()})
    assert notes == ["converted weights from float16 to float32"]
    assert torch.allclose(model.fc.weight, own.fc.weight, atol=1e-2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_a_tensor_stored_once_is_found_under_both_names() -> None:
    own, model = Tied(), Tied()
    state = {name: tensor for name, tensor in own.state_dict().items() if name != "b.weight"}
    fit_weights(model, Weights(state, None, Path("net.pth")))
    assert torch.equal(model.b.weight, own.a.weight)
    assert model.b.weight is model.a.weight


def test_what_does_not_fit_is_named_with_the_nearest_name() -> None:
    state = dict(trained().state_dict())
    state["head.weight"], state["head.bias"] = state.pop("fc.weight"), state.pop("fc.bias")
    state["stem.weight"] = torch.zeros(8, 1, 3, 3)
    state["c1.weights"] = state.pop("c1.weight")
    with pytest.raises(ShoalError) as caught:
        fitted(state)
    text = str(caught.value)
    assert "found weights of another network at net.pth: 3 missing: " in text
    assert "c1.weight (nearest: c1.weights)" in text
    assert "3 unexpected: " in text
    assert "1 of another shape: stem.weight (8, 1, 3, 3) instead of (4, 1, 3, 3)" in text


def test_five_names_are_listed_and_the_rest_are_counted() -> None:
    few = {k: v for k, v in trained().state_dict().items() if not k.endswith(("weight", "bias"))}
    listed = "17 missing: stem.weight, bn.weight, bn.bias, a1.weight, b1.weight and 12 more; 1 unexpected: x;"
    with pytest.raises(ShoalError, match=listed):
        fitted(few | {"x": torch.ones(1)})


def test_a_module_in_memory_is_a_teacher_in_two_lines() -> None:
    own, data = trained(), blobs()
    spec, teacher = adopt(own, data)
    x = torch.randn(2, 1, 8, 8)
    assert torch.allclose(teacher(x), own(x), atol=1e-5)
    preset = shoal.quick(sensitivity=1, mask=2, finetune=1)
    result = shoal.reduce(
        spec, teacher, shallow.Options(100, gates=False, exit=False), preset, shoal.Stages(data, shoal.Settings())
    )
    assert shoal.count(result.model, data.shape).relus == 100


def test_another_number_of_logits_is_refused() -> None:
    for classes in (3, 5):
        with pytest.raises(
            ShoalError, match=f"found a result of shape .{classes},. for an image from 'given'; need 4 logits"
        ):
            adopt(randomise(Residual(classes)), blobs())


def test_the_module_itself_is_not_changed() -> None:
    own = trained()
    before = copy.deepcopy(own.state_dict())
    adopt(own, blobs())
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
