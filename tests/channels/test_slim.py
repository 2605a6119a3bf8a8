"""Networks of several widths: each is what it would be alone, and one training serves all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from shoal.channels.slim_layers import SlimConv2d, SlimLayer, kept
from shoal.channels.slimmable import Slimmable, narrowed, slimmable
from shoal.cli.app import app
from shoal.errors import ShoalError, StoppedError
from shoal.models import build
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.recipes import shallow
from shoal.recipes.shallow.presets import Preset
from shoal.recipes.stages import Stages
from shoal.reduction.masks import MaskedReLU, add_masks, masked_sites
from shoal.storage.run import Run
from shoal.surgery.normal_form import normalise
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import count
from shoal.training.evaluation import evaluate
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.conftest import Residual, blobs, randomise
from tests.support.tables import fast_first

CIFAR, SHAPE = (3, 32, 32), (1, 8, 8)
DATA = blobs(128)
PLAN = Schedule(2, 0.05, (1,), batch_size=32)
LONGER = Schedule(8, 0.1, (2,), batch_size=16)
PRESET = Preset(PLAN, replace(PLAN, epochs=1), PLAN, LONGER, beta=1.0, rewirings=2)
SPEC = Spec("given", 4, SHAPE)
ZOO = ("resnet10", "resnet18", "wrn-16-4", "vgg16-avg", "mobilenetv1")


@pytest.mark.parametrize("name", fast_first(ZOO))
def test_every_width_is_the_network_of_that_width(name: str) -> None:
    model, x = randomise(build(name, 10, width=0.25)).eval(), torch.randn(2, 3, 32, 32)
    slim = slimmable(model, CIFAR, (0.5, 1.0))
    logits, truth = slim(x), model(x)
    assert not slim.training
    assert (logits[1] - truth).abs().max() < 1e-5
    for index, width in enumerate((0.125, 0.25)):
        own, plain = narrowed(slim, index, CIFAR), build(name, 10, width=width)
        assert torch.equal(own(x), slim(x)[index])
        assert not {p.data_ptr() for p in own.state_dict().values()} & {
            p.data_ptr() for p in slim.state_dict().values()
        }
        assert not any(isinstance(module, (SlimLayer, Slimmable)) for module in own.modules())
        a, b = count(own, CIFAR), count(plain, CIFAR)
        assert (a.relus, a.macs, a.linear_macs, a.depth, a.params) == (
            b.relus,
            b.macs,
            b.linear_macs,
            b.depth,
            b.params,
        )


def test_masks_of_the_first_channels() -> None:
    model = randomise(Residual()).eval()
    generator = torch.Generator().manual_seed(1)
    masks = {s.name: torch.rand(s.shape, generator=generator) < 0.5 for s in relu_sites(model, SHAPE)}
    slim = slimmable(add_masks(model, masks), SHAPE, (0.5, 1.0))
    own, x = narrowed(slim, 0, SHAPE), torch.randn(3, *SHAPE)
    assert {n: m.mask.tolist() for n, m in masked_sites(own).items()} == {
        n: m[: len(m) // 2].tolist() for n, m in masks.items()
    }
    assert all(type(m) is MaskedReLU for m in masked_sites(own).values())
    assert torch.equal(own(x), slim(x)[0])
    assert (slim(x)[1] - add_masks(model, masks)(x)).abs().max() < 1e-6


def test_shared_weights_learn_from_both_widths_and_norms_from_their_own() -> None:
    slim = slimmable(normalise(Residual()).train(), SHAPE, (0.5, 1.0))
    x = torch.randn(8, *SHAPE)
    before = {k: v.clone() for k, v in slim.state_dict().items()}
    slim.at(0)(x)[:, 0].sum().backward()
    after = slim.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved
    assert all(".norms.0." in k for k in moved)
    convs = [m for m in slim.modules() if isinstance(m, SlimConv2d)]
    for conv in convs:
        used = conv.weight.grad
        assert used is not None
        assert not used[conv.outputs :].any()
        assert used[: conv.outputs].any()


def test_channels_by_hand() -> None:
    assert [kept(c, p) for c, p in ((64, 0.5), (5, 0.5), (3, 0.5), (1, 0.25), (24, 0.75))] == [32, 3, 2, 1, 18]


class Concatenating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3)))


def grouped(channels: int, groups: int) -> nn.Module:
    layers = nn.Conv2d(1, channels, 3), nn.Conv2d(channels, channels, 3, groups=groups), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


def test_groups_go_whole() -> None:
    slim, x = slimmable(grouped(8, 4).eval(), SHAPE, (0.5, 1.0)), torch.randn(2, *SHAPE)
    own = narrowed(slim, 0, SHAPE)
    assert own.get_submodule("1").groups == 2
    assert torch.equal(own(x), slim(x)[0])


REFUSED = [
    (Residual, (0.5,), "found widths"),
    (Residual, (1.0, 0.5), "found widths"),
    (Residual, (0.0, 1.0), "found widths"),
    (Residual, (0.25, 0.5), "found widths"),
    (Concatenating, (0.5, 1.0), "found concat at"),
    (lambda: grouped(8, 4), (0.4, 1.0), "whole groups"),
    (lambda: nn.Sequential(nn.Conv2d(1, 4, 8), nn.ReLU(), nn.Flatten()), (0.5, 1.0), "need one linear layer"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), (0.5, 1.0),
     "found BatchNorm1d at 2"),
    (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)),
     (0.5, 1.0), "found GroupNorm"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "widths", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_cut_is_refused_by_name(make: type[nn.Module], widths: tuple[float, ...], message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        slimmable(make(), SHAPE, widths)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(3)
    model = normalise(Residual())
    fit(model, DATA, Objective((cross_entropy(),)), Schedule(3, 0.1, batch_size=16))
    return model.eval()


def options(**more: object) -> shallow.Options:
    return shallow.Options(**({"budget": 150, "gates": False, "exit": False, "widths": (0.5, 1.0)} | more))  # type: ignore[arg-type]


@pytest.mark.usefixtures("epochwise")
@pytest.mark.slow
def test_one_reduction_gives_every_width_and_goes_on_after_stops(teacher: nn.Module, tmp_path: Path) -> None:
    whole = shallow.reduce(SPEC, teacher, options(), PRESET, Stages(DATA, Settings()))
    pieces = Settings(max_seconds=0.0, resume=True)
    while True:
        try:
            again = shallow.reduce(SPEC, teacher, options(), PRESET, Stages(DATA, pieces, Run(tmp_path)))
            break
        except StoppedError:
            continue
    spec, narrow = whole.narrower[0.5]
    for a, b in ((whole.model, again.model), (narrow, again.narrower[0.5][1])):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert count(whole.model, SHAPE).relus == 150
    small, large = count(narrow, SHAPE), count(whole.model, SHAPE)
    assert 0 < small.relus < 150
    assert small.macs < large.macs / 2
    assert evaluate(narrow, DATA, DATA.test)[0] > 40  # four classes; an untrained width is at 25
    for own, model in ((whole.spec, whole.model), (spec, narrow)):
        own.save(tmp_path / "spec.json")
        built = assemble(Spec.load(tmp_path / "spec.json"), teacher)
        built.load_state_dict(model.state_dict())
        x = torch.randn(2, *SHAPE)
        assert torch.equal(built.eval()(x), model(x))


def test_options_that_widths_do_not_go_with(teacher: nn.Module) -> None:
    for more in ({"exit": True}, {"gates": True}, {"masks": "autorep"}, {"widths": (0.5,)}):
        with pytest.raises(ShoalError, match="found widths"):
            shallow.check_options(options(**more), PRESET, teacher, SHAPE)


def test_a_damaged_spec_is_refused(tmp_path: Path) -> None:
    replace(SPEC, widths=("half", 1.0)).save(tmp_path / "spec.json")  # type: ignore[arg-type]
    with pytest.raises(ShoalError, match="found no list of numbers at 'widths'"):
        Spec.load(tmp_path / "spec.json")


@pytest.mark.slow
def test_widths_from_the_command_line_are_runs_of_their_own(tmp_path: Path) -> None:
    run, out = CliRunner().invoke, tmp_path / "reduced"
    made = ["train", "resnet10", "--data", "digits", "--width", "0.125", "--epochs", "1", "--limit", "200"]
    assert run(app, [*made, "--out", str(tmp_path / "teacher")]).exit_code == 0
    words = ["reduce", str(tmp_path / "teacher"), "--budget", "1000", "--epochs", "1,1,1", "--out", str(out)]
    done = run(app, [*words, "--no-gates", "--no-exit", "--widths", "0.5,1"])
    assert done.exit_code == 0, done.output
    assert "with 0.5 of the channels" in done.output
    alone = run(app, ["evaluate", str(out / "widths" / "0.5"), "--json"])
    assert alone.exit_code == 0, alone.output
    assert '"relus": ' in alone.output
    with pytest.raises(ShoalError, match="found --widths"):
        run(app, [*words, "--widths", "half"], catch_exceptions=False)
