"""Cutting channels: the text that says which ones stay, the surgery against networks that do not look, and the spec."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.channels.cut import Kept, composed, keep_channels, parse, written
from shoal.errors import ShoalError
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec, pruned_spec
from shoal.reduction.masks import MaskedReLU, add_masks
from shoal.reduction.quadratic import QuadraticReLU, add_quadratics
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import count
from tests.conftest import Residual, randomise

SHAPE = (1, 8, 8)


def test_text_by_hand() -> None:
    texts = ("conv1=0-3,5/16", "layer1.0.fc=2/3")
    kept = {"conv1": Kept((0, 1, 2, 3, 5), 16), "layer1.0.fc": Kept((2,), 3)}
    assert parse(texts) == kept
    assert written(kept) == texts
    assert written({"a": Kept((0, 2, 3, 7), 8)}) == ("a=0,2-3,7/8",)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_text_comes_back(places: set[int]) -> None:
    kept = {"a=b": Kept(tuple(sorted(places)), 41)}
    assert parse(written(kept)) == kept


@pytest.mark.parametrize(
    "texts",
    [
        ("conv1",),
        ("conv1=0-3",),
        ("conv1=/4",),
        ("=0/1",),
        ("conv1=5/4",),
        ("conv1=3-1/8",),
        ("conv1=1,1/8",),
        ("conv1=2,1/8",),
        ("conv1=-1/8",),
        ("conv1=0-99999999999/4",),
        ("conv1=0-99999999999/999999999999",),
        (f"conv1={'9' * 5000}/{'9' * 5000}",),
        ("conv1=0/1", "conv1=0/1"),
    ],
)
def test_other_texts_are_refused(texts: tuple[str, ...]) -> None:
    with pytest.raises(ShoalError, match="need"):
        parse(texts)


def test_composed_by_hand() -> None:
    first = {"a": Kept((1, 3, 5), 6), "b": Kept((0,), 2)}
    assert composed(first, {"a": Kept((0, 2), 3), "c": Kept((1,), 4)}) == {
        "a": Kept((1, 5), 6),
        "b": Kept((0,), 2),
        "c": Kept((1,), 4),
    }


class Mixed(nn.Module):
    """Two branches joined end to end, a grouped convolution, and features flattened by a number written out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 2, 1)
        self.grouped = nn.Conv2d(6, 8, 3, stride=4, padding=1, groups=2)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.PReLU(8)
        self.fc1, self.fc2 = nn.Linear(32, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.a(x), self.b(x).relu()), 1)
        x = self.act(self.deep(self.grouped(x))).reshape(-1, 32)
        return self.fc2(torch.relu(self.fc1(x)))


MIXED = {
    "a": Kept((0, 2, 3), 4),
    "b": Kept((1,), 2),
    "grouped": Kept((0, 3, 5, 6), 8),
    "fc1": Kept((1, 2, 5), 6),
}


def blind(weight: Tensor, gone: list[int]) -> None:
    weight.data[:, gone] = 0


def test_places_are_followed_through_joins_groups_and_flattening() -> None:
    model, x = Mixed().eval(), torch.randn(3, *SHAPE)
    cut = keep_channels(model, SHAPE, MIXED)
    # Groups of the convolution read places 0-2 and 3-5, of which 1 and 4 are gone.
    for rows, gone in ((slice(0, 4), 1), (slice(4, 8), 1)):
        model.grouped.weight.data[rows, gone] = 0
    blind(model.fc1.weight, [place for c in (1, 2, 4, 7) for place in range(4 * c, 4 * c + 4)])
    blind(model.fc2.weight, [0, 3, 4])
    torch.testing.assert_close(cut(x), model(x), atol=1e-6, rtol=0)
    sizes = {name: tuple(p.shape) for name, p in cut.named_parameters()}
    assert sizes["grouped.weight"] == (4, 2, 3, 3)
    assert sizes["deep.weight"] == (4, 1, 3, 3)
    assert sizes["act.weight"] == (4,)
    assert sizes["fc1.weight"] == (3, 16)
    assert cut(torch.randn(5, *SHAPE)).shape == (5, 4)


@pytest.mark.parametrize("kind", ["plain", "masked", "quadratic"])
def test_a_residual_network(residual: nn.Module, kind: str) -> None:
    model = residual
    if kind != "plain":
        masks = {site.name: torch.rand(site.shape) > 0.5 for site in relu_sites(model, SHAPE)}
        model = add_masks(model, masks) if kind == "masked" else add_quadratics(model, masks)
        for module in model.modules():
            if isinstance(module, QuadraticReLU):
                module.rest.square.data.uniform_(-1, 1)
    kept = {"stem": Kept((1, 2), 4), "a2": Kept((1, 2), 4), "a1": Kept((0,), 4)}
    cut = keep_channels(model, SHAPE, kept)
    x, seen = torch.randn(2, *SHAPE), dict(model.named_modules())
    for name, gone in (("a1", [0, 3]), ("a2", [1, 2, 3]), ("c1", [0, 3]), ("short", [0, 3])):
        blind(seen[name].weight, gone)
    torch.testing.assert_close(cut.eval()(x), model.eval()(x), atol=1e-6, rtol=0)
    assert set(cut.state_dict()) == set(model.state_dict())
    whole, fewer = count(model, SHAPE), count(cut, SHAPE)
    assert fewer.relus < whole.relus
    assert fewer.macs < whole.macs
    if kind == "masked":
        assert fewer.relus == sum(int(m.mask.sum()) for m in cut.modules() if isinstance(m, MaskedReLU))


def test_modes_frozen_weights_and_the_model_stay(residual: nn.Module) -> None:
    residual.train()
    residual.bn.eval()
    residual.a1.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in residual.state_dict().items()}
    cut = keep_channels(residual, SHAPE, {"a1": Kept((0, 3), 4), "c1": Kept((1,), 8)})
    assert cut.b1.training
    assert not cut.bn.training
    assert not cut.a1.weight.requires_grad
    assert cut.c1.weight.requires_grad
    assert torch.equal(cut.a1.weight, residual.a1.weight[[0, 3]])
    assert (cut.b1.num_features, cut.a2.in_channels, cut.a1.out_channels) == (2, 2, 2)
    assert all(torch.equal(v, before[k]) for k, v in residual.state_dict().items())


class Scaled(Residual):
    """A residual network with a parameter for each channel that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.relu(self.stem(x) * self.scale).mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("model", "kept", "pattern"),
    [
        (Residual, {"stem": Kept((1,), 4)}, "at add.* a2, stem"),
        (Residual, {"fc": Kept((1,), 4)}, "logits cut"),
        (Residual, {"nothing": Kept((1,), 4)}, "no layer 'nothing'"),
        (Residual, {"bn": Kept((1,), 4)}, "no layer 'bn'"),
        (Residual, {"a1": Kept((1,), 5)}, "found 4 outputs at a1; need 5"),
        (Scaled, {"stem": Kept((1,), 4)}, "joins channels by their place at mul"),
        (Mixed, {"a": Kept((0, 2, 3), 4)}, "groups at grouped"),
    ],
)
def test_refused(model: type[nn.Module], kept: dict[str, Kept], pattern: str) -> None:
    with pytest.raises(ShoalError, match=pattern):
        keep_channels(model(), SHAPE, kept)


BASE = Spec("resnet10", 10, (1, 8, 8), 0.125)


def test_a_spec_of_fewer_channels(tmp_path: Path) -> None:
    once = pruned_spec(BASE, {"layer1.0.conv1": Kept((0, 2, 5), 8)})
    twice = pruned_spec(once, {"layer1.0.conv1": Kept((1, 2), 3)})
    assert twice.base_channels == ("layer1.0.conv1=2,5/8",)
    assert not twice.is_reduced
    twice.save(tmp_path / "model.json")
    assert Spec.load(tmp_path / "model.json") == twice
    layer = assemble(twice).get_submodule("layer1.0.conv1")
    assert tuple(layer.weight.shape) == (2, 8, 3, 3)


def test_after_other_surgery_channels_are_cut_last(tmp_path: Path) -> None:
    spec = Spec(**asdict(BASE) | {"exits": ("layer2.0.relu2",), "masked": ("layer1.0.relu1",)})
    cut = pruned_spec(spec, {"exits.layer2_0_relu2.conv": Kept((3,), 16), "layer1.0.conv1": Kept((1,), 8)})
    assert cut.base_channels == ()
    assert cut.is_reduced
    cut.save(tmp_path / "model.json")
    model = randomise(assemble(Spec.load(tmp_path / "model.json")))
    assert model.get_submodule("layer1.0.relu1").mask.shape[0] == 1
    assert [len(y) for y in model(torch.randn(2, *BASE.shape))] == [2, 2]


def test_files_old_and_damaged(tmp_path: Path) -> None:
    path, body = tmp_path / "model.json", asdict(BASE)
    old = {k: v for k, v in body.items() if k not in ("base_channels", "kept_channels")}
    path.write_text(json.dumps(old))
    assert Spec.load(path) == BASE
    for damage in ("conv1=0/1", ["conv1=9/8"], [3], None, {"conv1": [0]}):
        path.write_text(json.dumps(body | {"kept_channels": damage}))
        with pytest.raises(ShoalError, match="need"):
            Spec.load(path)


def test_another_width_is_no_base() -> None:
    spec = pruned_spec(BASE, {"conv1": Kept((0,), 8)})
    with pytest.raises(ShoalError, match="found 16 outputs at conv1; need 8"):
        assemble(Spec(**asdict(spec) | {"width": 0.25}))
