"""In-place distillation: eq. 4 to 7 by hand, who learns, presets, and one training for exits and for widths."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.channels.slimmable import Slimmable, slimmable
from shoal.errors import ShoalError, StoppedError
from shoal.exits.anytime import macs
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.outputs import Outputs, forward
from shoal.recipes import inplace
from shoal.recipes.inplace import Options, objective
from shoal.recipes.stages import Stages
from shoal.storage.run import Run
from shoal.surgery.tracing import count
from shoal.training.evaluation import evaluate
from shoal.training.optimiser import parameter_groups
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.conftest import Residual, blobs
from tests.support.tables import fast_first

SHAPE = (1, 8, 8)
DATA = blobs(64)
SPEC = Spec("given", 4, SHAPE)
LABELS = (0, 3, 1)
LOGITS = (
    ((0.2, -0.4, 1.0, 0.3), (0.0, 0.5, -0.5, 0.1), (1.2, 0.3, -0.7, 0.4)),
    ((1.0, 0.2, -0.3, 0.5), (-0.2, 0.1, 0.6, 0.9), (0.1, 0.8, 0.2, -0.9)),
    ((2.0, -1.0, 0.5, 0.0), (-0.3, 0.2, 0.1, 1.5), (0.4, 1.6, -0.2, -0.8)),
)
"""Three classifiers, weak to strong, on three samples of four classes."""


def logits() -> tuple[Tensor, ...]:
    return tuple(torch.tensor(z, requires_grad=True) for z in LOGITS)


def soft(z: tuple[float, ...], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(v / temperature) for v in z]
    return [p / sum(powers) for p in powers]


def ce(i: int) -> float:
    return -sum(math.log(soft(z)[y]) for z, y in zip(LOGITS[i], LABELS, strict=True)) / 3


def kl(student: int, teacher: int, temperature: float, reverse: bool = False) -> float:
    """Mean over samples of KL(teacher || student), softened, times the temperature squared."""
    total = 0.0
    for s, t in zip(LOGITS[student], LOGITS[teacher], strict=True):
        q, p = soft(s, temperature), soft(t, temperature)
        p, q = (q, p) if reverse else (p, q)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / 3


EQUATIONS = {
    "conventional": lambda t, r: ce(0) + ce(1) + ce(2),
    "ipkd": lambda t, r: ce(2) + 0.2 * (ce(0) + ce(1)) + 0.8 * (kl(0, 2, t, r) + kl(1, 2, t, r)),
    "ta-1": lambda t, r: ce(2) + 0.2 * (ce(0) + ce(1)) + 0.8 * (kl(0, 1, t, r) + kl(1, 2, t, r)),
    "ta-m": lambda t, r: ce(2) + 0.2 * (ce(0) + ce(1)) + 0.8 * ((kl(0, 1, t, r) + kl(0, 2, t, r)) / 2 + kl(1, 2, t, r)),
}


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("method", EQUATIONS)
def test_equations_by_hand(method: str, temperature: float, direction: str) -> None:
    loss, parts = objective(method, 3, 0.8, temperature, direction)(Outputs(logits()), None, torch.tensor(LABELS))
    assert loss.item() == pytest.approx(EQUATIONS[method](temperature, direction == "reverse"), rel=0, abs=1e-6)
    assert sum(part.item() for part in parts.values()) == pytest.approx(loss.item(), rel=0, abs=1e-6)


@pytest.mark.parametrize("method", ["ipkd", "ta-1", "ta-m"])
def test_the_soft_target_alone_teaches_the_weaker_ones_and_no_teacher(method: str) -> None:
    """lambda 1: weaker classifiers have no labels' term; the strongest learns from labels and from nothing else."""
    student = logits()
    loss, parts = objective(method, 3, 1.0)(Outputs(student), None, torch.tensor(LABELS))
    assert set(parts) == {"classifier2_cross_entropy", "self_kd"}
    loss.backward()
    alone = torch.tensor(LOGITS[2], requires_grad=True)
    nn.functional.cross_entropy(alone, torch.tensor(LABELS)).backward()
    assert torch.allclose(student[2].grad, alone.grad)  # type: ignore[arg-type]
    assert all(z.grad is not None and z.grad.abs().sum() > 0 for z in student[:2])


def test_a_soft_cross_entropy_has_the_divergences_gradient() -> None:
    """The paper takes cross-entropy in place of the divergence for slimmable networks."""
    student, again = logits(), logits()
    objective("ipkd", 3, 1.0)(Outputs(student), None, torch.tensor(LABELS))[0].backward()
    target = again[2].detach().softmax(1)
    sum(nn.functional.cross_entropy(z, target) for z in again[:2]).backward()  # type: ignore[union-attr]
    assert all(torch.allclose(a.grad, b.grad, atol=1e-7) for a, b in zip(student[:2], again[:2], strict=True))  # type: ignore[arg-type]


PRESETS: list[tuple[str, bool, dict[str, Any], dict[str, Any]]] = [
    ("paper", False, {"weight": 0.8, "temperature": 5.0, "decay_all": True},
     {"epochs": 300, "lr": 0.1, "batch_size": 64, "weight_decay": 1e-4, "milestones": (150, 225), "gamma": 0.1}),
    ("paper", True, {"weight": 0.8, "temperature": 1.0, "decay_all": True},
     {"epochs": 200, "lr": 0.1, "batch_size": 128, "weight_decay": 5e-4, "milestones": (60, 120, 160), "gamma": 0.2}),
    ("slimmable-code", True, {"weight": 1.0, "temperature": 1.0, "decay_all": False},
     {"epochs": 200, "nesterov": True, "weight_decay": 1e-4}),
    ("quick", False, {"weight": 0.8, "temperature": 5.0}, {"kind": "cosine"}),
    ("quick", True, {"weight": 0.8, "temperature": 1.0}, {"kind": "cosine"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "widths", "preset", "schedule"), PRESETS)
def test_presets(name: str, widths: bool, preset: dict[str, Any], schedule: dict[str, Any]) -> None:
    made = inplace.PRESETS[name](widths)
    assert {key: getattr(made, key) for key in preset} == preset
    assert {key: getattr(made.schedule, key) for key in schedule} == schedule


@pytest.mark.parametrize("shared_affine", [False, True])
def test_public_codes_weight_decay(shared_affine: bool) -> None:
    """On dense convolutions and linear layers alone."""
    spec = Spec("mobilenetv1", 4, SHAPE, 0.25, widths=(0.5, 1.0), shared_affine=shared_affine)
    model = assemble(spec)
    inplace._without_decay(model)
    decayed = {id(p) for g in parameter_groups(model, 1e-4) if g["weight_decay"] for p in g["params"]}
    named = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert named == {"conv1.weight", "fc.weight", "fc.bias", *(f"pairs.{i}.conv2.weight" for i in range(13))}


class TwoExits(nn.Module):
    """A user's network with a classifier of its own after its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn1, self.early = nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.b, self.bn2, self.late = nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.bn1(self.a(x)))
        y = torch.relu(self.bn2(self.b(x)))
        return self.early(x.mean((2, 3))), self.late(y.mean((2, 3)))


PLAN = replace(inplace.quick(True), schedule=Schedule(2, 0.1, batch_size=16))
CASES = [
    (TwoExits, Options("ta-m"), ("1", "2")),
    (Residual, Options("ta-1", exits=("relu",)), ("1", "2")),
    (Residual, Options("ta-m", widths=(0.5, 0.75, 1.0)), ("0.5", "0.75", "1")),
    (Residual, Options("ipkd", widths=(0.25, 0.5, 0.75, 1.0), drawn=2), ("0.25", "0.5", "0.75", "1")),
    (Residual, Options("conventional", widths=(0.5, 1.0), shared_affine=True), ("0.5", "1")),
]


@pytest.mark.usefixtures("epochwise")
@pytest.mark.parametrize(("make", "options", "names"), fast_first(CASES), ids=range(len(CASES)))
def test_one_training_gives_every_classifier_and_goes_on_after_stops(
    make: type[nn.Module], options: Options, names: tuple[str, ...], tmp_path: Path
) -> None:
    base = make()
    whole = inplace.train(SPEC, options, PLAN, Stages(DATA, Settings()), base=base)
    pieces, tries = Settings(max_seconds=0.0, resume=True), 0
    while tries < 5:
        tries += 1
        try:
            again = inplace.train(SPEC, options, PLAN, Stages(DATA, pieces, Run(tmp_path)), base=base)
            break
        except StoppedError:
            continue
    assert 1 < tries < 5
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.model.state_dict().items())
    assert tuple(whole.parts) == names
    x, price = DATA.normalise(DATA.test.images), macs(whole.model, SHAPE)
    logits = forward(whole.model, x).logits
    for index, (spec, own) in enumerate(whole.parts.values()):
        assert torch.allclose(own(x), logits[index], atol=1e-6)
        total = count(own, SHAPE)
        assert total.macs + total.linear_macs == price.alone[index]
        spec.save(tmp_path / "spec.json")
        built = assemble(Spec.load(tmp_path / "spec.json"), base)
        built.load_state_dict(own.state_dict())
        # Training leaves weights in another memory layout, and sums in another order.
        assert torch.allclose(built.eval()(x), own(x), atol=1e-6)


def test_the_epoch_kept_is_the_best_on_average() -> None:
    plan = replace(PLAN, schedule=Schedule(4, 0.1, batch_size=16))
    result = inplace.train(SPEC, Options("ta-m", widths=(0.5, 1.0)), plan, Stages(DATA, Settings()), base=Residual())
    means = [(row["accuracy"] + row["accuracy_exit0"]) / 2 for row in result.history.rows]
    assert result.history.best == pytest.approx(max(means))
    kept = evaluate(result.model, DATA, DATA.val)
    assert sum(kept) / 2 == pytest.approx(max(means))


REFUSED = [
    (Options("ta-2", widths=(0.5, 1.0)), "found method 'ta-2'"),
    (Options(), "found one classifier in"),
    (Options(widths=(0.5, 1.0), exits=("relu",)), "found widths and exits"),
    (Options(shared_affine=True), "need a slimmable network"),
    (Options(drawn=2), "need a slimmable network"),
    (Options(widths=(0.5, 1.0), drawn=-1), "found -1 drawn widths"),
    (Options(widths=(0.5, 1.0), drawn=16), "found 16 drawn widths"),
    (Options(widths=(0.5, 0.75)), "found widths"),
    (Options(widths=(0.5, 1.0), direction="both"), "found KL direction 'both'"),
    (Options("conventional", widths=(0.5, 1.0), direction="reverse"), "need a method that distils"),
    (Options(exits=("nowhere",)), "found no site"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_mean_nothing_are_refused(options: Options, message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        inplace.check_options(options, SPEC, Residual())


def test_the_public_codes_preset_is_for_widths() -> None:
    with pytest.raises(ShoalError, match="found preset 'slimmable-code' without widths"):
        inplace.slimmable_code(False)


@pytest.mark.parametrize("drawn", fast_first([0, 1]))
def test_a_slimmable_resnet_learns_at_every_width(drawn: int) -> None:
    """With norms of its own for each width, and drawn between the ends: then 0.75 is never trained as such."""
    spec, widths = Spec("resnet10", 4, SHAPE, 0.125), (0.5, 0.75, 1.0)
    plan = replace(PLAN, schedule=Schedule(4, 0.1, kind="cosine", batch_size=16))
    result = inplace.train(spec, Options("ta-m", widths=widths, drawn=drawn), plan, Stages(DATA, Settings()))
    assert isinstance(result.model, Slimmable)
    assert min(evaluate(result.model, DATA, DATA.test)) > 50  # four classes
    untrained = slimmable(assemble(spec), SHAPE, widths)
    assert max(evaluate(untrained, DATA, DATA.test)) < 50
