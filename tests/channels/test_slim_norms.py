"""Batch norms of several widths: published counts, shared scales, statistics taken afterwards, drawn widths."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shoal.channels.batch_norm import Calibration, calibrate_bn
from shoal.channels.slim_layers import SharedAffineBatchNorm2d, SlimLayer, kept
from shoal.channels.slimmable import Slimmable, narrowed, slimmable
from shoal.errors import ShoalError
from shoal.models import build
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.surgery.normal_form import normalise
from shoal.surgery.tracing import count
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.conftest import Residual, blobs, randomise

CIFAR, SHAPE = (3, 32, 32), (1, 8, 8)
WIDTHS = (0.25, 0.5, 0.75, 1.0)
DATA = blobs(64)

# classes, multiply-adds (convolutions and linear layers) and parameters of each width, parameters of the whole network
MOBILENET = [
    (10, (3_331_072, 12_167_168, 26_508_288, 46_354_432), (215_642, 823_722, 1_824_250, 3_217_226), 3_250_058),
    (100, (3_354_112, 12_213_248, 26_577_408, 46_446_592), (238_772, 869_892, 1_893_460, 3_309_476), 3_342_308),
]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("classes", "macs", "params", "whole"), MOBILENET)
def test_slimmable_mobilenet_as_published(
    classes: int, macs: tuple[int, ...], params: tuple[int, ...], whole: int
) -> None:
    slim = slimmable(build("mobilenetv1", classes), CIFAR, WIDTHS)
    totals = [count(narrowed(slim, index, CIFAR), CIFAR) for index in range(len(WIDTHS))]
    assert tuple(total.macs + total.linear_macs for total in totals) == macs
    assert tuple(total.params for total in totals) == params
    assert parameters(slim) == whole


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv1"])
def test_what_widths_add_to_a_network(name: str) -> None:
    """Norms of their own add scales and shifts of every narrower width; shared ones add no parameter."""
    model = build(name, 10, width=0.25)
    norms = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    more = sum(2 * kept(channels, part) for channels in norms for part in WIDTHS[:-1])
    assert parameters(slimmable(model, CIFAR, WIDTHS)) == parameters(model) + more
    assert parameters(slimmable(model, CIFAR, WIDTHS, shared_affine=True)) == parameters(model)


@pytest.fixture
def shared() -> Slimmable:
    return slimmable(randomise(Residual()), SHAPE, WIDTHS, shared_affine=True)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_shared_scales_at_every_width(shared: Slimmable) -> None:
    x, truth = images(), randomise(Residual())
    truth.load_state_dict({k: v for k, v in shared_state(shared).items() if k in truth.state_dict()})
    assert (shared(x)[-1] - truth(x)).abs().max() < 1e-6
    for index in range(len(WIDTHS)):
        own = narrowed(shared, index, SHAPE)
        assert not any(isinstance(module, SlimLayer) for module in own.modules())
        assert torch.equal(own(x), shared(x)[index])


def shared_state(slim: Slimmable) -> dict[str, Tensor]:
    """The state of the network of the whole width."""
    return dict(narrowed(slim, len(WIDTHS) - 1, SHAPE).state_dict())


def test_narrow_widths_teach_the_first_shared_scales_and_have_their_own_statistics(shared: Slimmable) -> None:
    shared.train().at(1)(images()).square().sum().backward()
    norms = [m for m in shared.modules() if isinstance(m, SharedAffineBatchNorm2d)]
    assert len(norms) == 3
    for norm in norms:
        assert norm.weight.grad is not None
        assert norm.weight.grad[:2].all()
        assert not norm.weight.grad[2:].any()
        assert [int(own.num_batches_tracked) for own in norm.norms] == [0, 1, 0, 0]  # type: ignore[arg-type]


def test_calibration_is_the_mean_of_the_batches_by_hand() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(2, 2))
    model[0].train()
    batches = [torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])]
    calibrate_bn(model.eval(), (b.reshape(2, 1, 1, 2) for b in batches))
    # means 4 and 1; variances over three degrees of freedom 20 / 3 and 4
    assert model[0].running_mean.item() == pytest.approx(2.5)
    assert model[0].running_var.item() == pytest.approx((20 / 3 + 4) / 2)
    assert model[0].momentum == 0.1
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("shared_affine", [False, True])
def test_calibration_gives_every_width_the_statistics_of_its_own_inputs(shared_affine: bool) -> None:
    slim = slimmable(normalise(Residual()).train(), SHAPE, WIDTHS, shared_affine=shared_affine)
    x = images(64)
    calibrate_bn(slim, [x])
    assert slim.training
    for index in range(len(WIDTHS)):
        with torch.no_grad():
            trained = slim.train().at(index)(x)
            tested = slim.eval().at(index)(x)
        # Statistics of this one batch: only the variance's divisor, n - 1 for n, parts them.
        assert (trained - tested).abs().max() < 1e-2
    once = {name: value.clone() for name, value in slim.named_buffers() if "running" in name}
    calibrate_bn(slim, [x, x, x])
    assert all(torch.allclose(value, slim.get_buffer(name), atol=1e-5) for name, value in once.items())


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [(Residual(), [], "found no batch to"), (nn.Linear(2, 2), [torch.ones(1, 2)], "found no batch norm")],
)
def test_what_cannot_be_calibrated(model: nn.Module, batches: list[Tensor], message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        calibrate_bn(model, batches)


def test_the_sandwich_rule(shared: Slimmable) -> None:
    shared.sandwich(2)
    x, state = images(), {k: v.clone() for k, v in shared.state_dict().items()}
    with torch.no_grad():
        assert len(shared.eval()(x)) == len(WIDTHS)
        torch.manual_seed(5)
        first, second = shared.train()(x), shared(x)
        torch.manual_seed(5)
        again = shared(x)
        ends = shared.at(0)(x), shared.at(-1)(x)
    assert len(first) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], ends[0])
    assert torch.equal(first[-1], ends[1])
    assert any(not torch.equal(a, b) for a, b in zip(first[1:-1], second[1:-1], strict=True))
    moved = {key for key, value in shared.state_dict().items() if not torch.equal(value, state[key])}
    assert {key.split(".")[2] for key in moved} == {"0", "3"}  # statistics of the narrowest and the widest alone


def test_drawn_widths_are_the_networks_of_those_widths() -> None:
    """A drawn width computes what a network made for it computes with the batch's statistics."""
    base = normalise(Residual()).train()
    slim = slimmable(base, SHAPE, (0.25, 1.0), shared_affine=True)
    slim.sandwich(3)
    torch.manual_seed(2)
    drawn = slim(images())
    torch.manual_seed(2)
    parts = (0.25 + 0.75 * torch.rand(3)).sort().values.tolist()
    made = slimmable(base, SHAPE, (0.25, *parts, 1.0), shared_affine=True)
    assert all(torch.equal(a, b) for a, b in zip(drawn, made(images()), strict=True))


@pytest.mark.parametrize(("shared_affine", "drawn"), [(False, 2), (True, 0)])
def test_a_sandwich_needs_shared_scales_and_something_in_it(shared_affine: bool, drawn: int) -> None:
    with pytest.raises(ShoalError, match="shared_affine=True"):
        slimmable(Residual(), SHAPE, WIDTHS, shared_affine=shared_affine).sandwich(drawn)


def test_a_drawn_width_must_not_split_a_group() -> None:
    layers = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU()
    slim = slimmable(nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 4)), SHAPE, (0.5, 1.0), shared_affine=True)
    with pytest.raises(ShoalError, match="found 4 groups of channels at 1"):
        slim.sandwich(2)


def test_scales_that_are_not_there_cannot_be_shared() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(ShoalError, match="found a batch norm without scales or statistics at 1"):
        slimmable(model, SHAPE, WIDTHS, shared_affine=True)


def test_fit_judges_and_keeps_calibrated_widths(shared: Slimmable) -> None:
    shared.sandwich(2)
    hook = Calibration(lambda: [DATA.normalise(DATA.train.images)])
    objective = Objective(tuple(cross_entropy(exit=i, name=f"ce{i}") for i in range(4)))
    history = fit(shared, DATA, objective, Schedule(2, 0.05, batch_size=16), hooks=(hook,))
    assert {"accuracy_exit0", "accuracy_exit1", "accuracy_exit2", "accuracy"} <= set(history.rows[-1])
    kept_state = {k: v.clone() for k, v in shared.state_dict().items()}
    calibrate_bn(shared, hook.batches())
    assert all(torch.allclose(v, kept_state[k], atol=1e-5) for k, v in shared.state_dict().items())


def test_the_mean_of_all_classifiers_can_choose_the_epoch() -> None:
    assert Settings(exit=None).score([10.0, 20.0, 60.0]) == pytest.approx(30)
    assert Settings().score([10.0, 20.0, 60.0]) == 60
    assert Settings(exit=0).score([10.0, 20.0, 60.0]) == 10


def test_a_spec_says_that_scales_are_shared(tmp_path: Path) -> None:
    spec = Spec("mobilenetv1", 4, SHAPE, 0.25, widths=(0.5, 1.0), shared_affine=True)
    spec.save(tmp_path / "spec.json")
    model = assemble(Spec.load(tmp_path / "spec.json"))
    assert sum(isinstance(m, SharedAffineBatchNorm2d) for m in model.modules()) == 27
    assert math.isfinite(float(model.eval()(torch.randn(2, *SHAPE))[0].detach().sum()))
