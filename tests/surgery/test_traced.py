"""Laws of `Traced`: what it finds is what the functions find, it traces once, and weights are never out of date."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.models import build
from shoal.reduction.masks import MaskedReLU, add_masks
from shoal.surgery import normal_form
from shoal.surgery.sites import find_blocks, relu_sites
from shoal.surgery.traced import Traced
from shoal.surgery.tracing import shapes, trace
from tests.conftest import Residual

SHAPE = (3, 32, 32)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


MODELS = ("resnet10", "osakd-cnn1", "mobilenetv2", pytest.param("msdnet-5", marks=pytest.mark.slow))


@pytest.mark.parametrize("name", MODELS)
def test_it_finds_what_the_functions_find(name: str) -> None:
    model = build(name, 10, width=0.25)
    traced, graph = Traced(model, SHAPE), trace(model, SHAPE)
    assert traced.sites == relu_sites(model, SHAPE)
    assert traced.blocks == find_blocks(model, SHAPE)
    assert (traced.graph.nodes, traced.graph.outputs) == (graph.nodes, graph.outputs)
    assert equal(traced.graph.weights, graph.weights)
    assert all(traced.shape_at(site.name) == site.shape for site in traced.sites)


def test_it_traces_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    once = normal_form.fx.Tracer.trace
    monkeypatch.setattr(normal_form.fx.Tracer, "trace", lambda *given: calls.append(given) or once(*given))
    traced = Traced(Residual(4, 3), SHAPE)
    assert not calls
    for _ in range(2):
        assert traced.sites
        assert traced.blocks
        assert traced.calls
        assert traced.graph.nodes
    assert len(calls) == 1


def test_a_graph_has_the_weights_of_the_moment_and_keeps_them() -> None:
    model = Residual(4, 3).train()
    traced = Traced(model, SHAPE)
    before = traced.graph
    held = {key: value.clone() for key, value in before.weights.items()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor += 1
    assert equal(before.weights, held)
    assert equal(traced.graph.weights, trace(model, SHAPE).weights)
    assert not equal(traced.graph.weights, held)
    model.load_state_dict(Residual(4, 3).state_dict())
    assert equal(traced.graph.weights, trace(model, SHAPE).weights)


def test_a_graph_counts_the_masks_of_the_moment() -> None:
    site = relu_sites(Residual(4, 3), SHAPE)[0]
    model = add_masks(Residual(4, 3), {site.name: torch.ones(site.shape, dtype=torch.bool)})
    traced = Traced(model, SHAPE)
    whole = cost(traced.graph).relus
    masked = model.get_submodule(site.name)
    assert isinstance(masked, MaskedReLU)
    masked.set_mask(torch.zeros(site.shape, dtype=torch.bool))
    assert cost(traced.graph).relus == whole - site.relus


class Counting(nn.Module):
    """Counts its calls in a buffer, in eval mode too."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize("counts", [False, True])
def test_tracing_leaves_the_module_as_it_is(counts: bool) -> None:
    model = (Counting() if counts else Residual(4, 3)).train()
    held = {key: value.clone() for key, value in model.state_dict().items()}
    for find in (lambda m, s: Traced(m, s).graph, relu_sites, find_blocks, trace):
        find(model, SHAPE)
        assert model.training
        assert all(module.training for module in model.modules())
        assert equal(dict(model.state_dict()), held)


def test_the_normal_form_shares_tensors_and_shapes_gives_a_copy() -> None:
    model = Residual(4, 3)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in Traced(model, SHAPE).normal.parameters()} == own
    assert own.isdisjoint(p.data_ptr() for p in shapes(model, SHAPE).parameters())


def test_refusals() -> None:
    with pytest.raises(ShoalError, match="found no ReLU in the model"):
        _ = Traced(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), SHAPE).sites
    with pytest.raises(ShoalError, match="found no submodule 'other' to read"):
        Traced(Residual(4, 3), SHAPE).shape_at("other")
    with pytest.raises(ShoalError, match="fails on images of shape"):
        _ = Traced(Residual(4, 3), (5, 32, 32)).normal
