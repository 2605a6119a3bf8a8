"""Networks that teach each other: who learns what by hand, and branches that are cut back to the plain network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx, nn

from shoal.distillation.mutual import below, cross_entropies, each_other, from_mean, lessons_of, sigmoid_ramp
from shoal.distillation.peers import Fusion, Gate, Peers, fork_of, fused, gated
from shoal.errors import ShoalError
from shoal.exits.classifiers import add_exits, default_exit_point, keep_exit
from shoal.models import build
from shoal.outputs import Outputs
from shoal.surgery.sites import relu_sites
from shoal.training.loop import fit
from shoal.training.objective import Objective, Term
from shoal.training.optimiser import parameter_groups
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.conftest import Residual, blobs, randomise
from tests.support.quick_networks import ONE_CLASSIFIER

SHAPE = (1, 8, 8)
FEW = ("resnet10", "resnet20", "wrn-16-4", "vgg16-avg", "osakd-cnn1")
LABELS = torch.tensor([0, 1, 3])
LOGITS = (
    torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]]),
    torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0]]),
    torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 4.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]]),
)


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> float:
    total = 0.0
    for t, s in zip((teacher / temperature).tolist(), (student / temperature).tolist(), strict=True):
        zt, zs = (math.log(sum(math.exp(v) for v in row)) for row in (t, s))
        total += sum(math.exp(a - zt) * ((a - zt) - (b - zs)) for a, b in zip(t, s, strict=True))
    return total / len(teacher) * temperature**2


def value(term: Term) -> float:
    return float(term.loss(Outputs(LOGITS), None, LABELS))


def test_mutual_learning_by_hand() -> None:
    a, b, c = LOGITS
    assert each_other(2) == {0: {1: 1.0}, 1: {0: 1.0}}
    assert value(lessons_of(each_other(2))) == pytest.approx(kl(b, a) + kl(a, b), abs=1e-6)
    three = sum(kl(t, s) for t in LOGITS for s in LOGITS if t is not s) / 2
    assert value(lessons_of(each_other(3))) == pytest.approx(three, abs=1e-6)
    assert value(lessons_of(below(2), 3.0)) == pytest.approx(kl(c, a, 3.0) + kl(c, b, 3.0), abs=1e-6)
    assert value(from_mean(2, (0, 1), 3.0)) == pytest.approx(kl((a + b) / 2, c, 3.0), abs=1e-6)


def test_no_teacher_learns() -> None:
    """The gradient of each classifier is that of the terms in which it is the student."""
    for term, pupils in ((lessons_of(below(2)), (0, 1)), (from_mean(2, (0, 1)), (2,))):
        leaves = tuple(z.clone().requires_grad_() for z in LOGITS)
        term.loss(Outputs(leaves), None, LABELS).backward()
        assert tuple(i for i, z in enumerate(leaves) if z.grad is not None) == pupils
    a, b = (z.clone().requires_grad_() for z in LOGITS[:2])
    lessons_of(each_other(2)).loss(Outputs((a, b)), None, LABELS).backward()
    assert a.grad is not None
    assert (a.grad - (a.softmax(1) - b.softmax(1)) / 3).abs().max() < 1e-6  # of KL(b || a) alone


def test_sigmoid_ramp() -> None:
    found = [sigmoid_ramp(80)(epoch) for epoch in (0, 40, 80, 200)]
    assert found == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1], abs=1e-6)
    with pytest.raises(ShoalError, match="found a ramp over 0 epochs"):
        sigmoid_ramp(0)


def test_gate_by_hand() -> None:
    gate = Gate(2, 2).eval()
    with torch.no_grad():
        gate.fc.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        gate.fc.bias.zero_()
    features = torch.tensor([[[[2.0, 0.0]], [[3.0, 1.0]]]])  # means 1 and 2: scores 1 and -2, of which ReLU leaves 1, 0
    first = math.exp(1 / math.sqrt(1 + 1e-5)) / (math.exp(1 / math.sqrt(1 + 1e-5)) + 1)
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 10.0]])
    assert gate(features, a, b).flatten().tolist() == pytest.approx([first, 10 * (1 - first)], abs=1e-6)


def test_fusion_has_the_layers_of_the_reference() -> None:
    """ResNet-32 on 10 classes: 3x3 depthwise on 128, 1x1 to 64, batch norm, linear."""
    fusion = Fusion(64, 2, 10)
    assert sum(p.numel() for p in fusion.parameters()) == 9 * 128 + 128 * 64 + 2 * 64 + 64 * 10 + 10
    assert fusion(torch.randn(3, 64, 4, 4), torch.randn(3, 64, 4, 4)).shape == (3, 10)


def test_own_weight_decay_covers_all_parameters_below() -> None:
    model = fused([Residual(), Residual()], SHAPE)
    plain, own = parameter_groups(model, 1e-4)
    assert (plain["weight_decay"], own["weight_decay"], own["multiplier"]) == (1e-4, 1e-5, 1.0)
    assert {id(p) for p in own["params"]} == {id(p) for p in model.get_submodule("fusion").parameters()}
    assert len(plain["params"]) + len(own["params"]) == len(list(model.parameters()))


def spliced(first: nn.Module, other: nn.Module, branch: fx.GraphModule) -> dict[str, Tensor]:
    """The first network's state with what branch 1 of `branch` has of its own from the other network."""
    own = {k.removeprefix("branches.1.") for k in branch.state_dict() if k.startswith("branches.1.")}
    assert own
    assert own < set(other.state_dict())
    return {k: (other if k in own else first).state_dict()[k] for k in first.state_dict()}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "name"), [*((gated, n) for n in ONE_CLASSIFIER), *((fused, n) for n in FEW)])
def test_branches_are_networks_of_their_own(make: Callable[..., fx.GraphModule], name: str) -> None:
    shape = (3, 16, 16)
    first, other = (randomise(build(name, 5, width=0.0625)) for _ in range(2))
    model, x = make([first, other], shape).eval(), torch.randn(3, *shape)
    logits = model(x)
    assert len(logits) == 3
    assert (logits[0] - first(x)).abs().max() < 1e-5
    mixed = build(name, 5, width=0.0625).eval()
    mixed.load_state_dict(spliced(first, other, model))
    assert (logits[1] - mixed(x)).abs().max() < 1e-5
    plain = keep_exit(model, 0)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in first.state_dict().items()}
    assert (plain(x) - first(x)).abs().max() < 1e-5


def test_three_branches_share_all_but_the_last_stage() -> None:
    model = gated([build("resnet20", 10, width=0.25) for _ in range(3)], (3, 32, 32))
    assert fork_of(relu_sites(build("resnet20", 10, width=0.25), (3, 32, 32))).shared == "layer2.2.relu2"
    owned = {k.split(".")[2] for k in model.state_dict() if k.startswith("branches.2.")}
    assert owned == {"layer3", "fc"}
    assert len(model(torch.randn(2, 3, 32, 32))) == 4


def test_peers_give_all_logits() -> None:
    networks = [randomise(Residual()) for _ in range(2)]
    x = torch.randn(3, *SHAPE)
    found = Peers(networks)(x)
    assert all(torch.equal(z, n(x)) for z, n in zip(found, networks, strict=True))


def test_one_loop_trains_them() -> None:
    """Branches, gate and shared stages all move, and the loop moves the ramp."""
    model = gated([Residual() for _ in range(2)], SHAPE).train()
    before = {k: v.clone() for k, v in model.named_parameters()}
    objective = Objective((*cross_entropies(3), lessons_of(below(2), 3.0, sigmoid_ramp(2))))
    data = blobs(64)
    history = fit(model, data, objective, Schedule(3, 0.05, batch_size=16), settings=Settings())
    assert objective.terms[-1].weight_at(objective.epoch) == 1
    assert {"accuracy", "accuracy_exit0", "accuracy_exit1", "mutual", "cross_entropy2"} <= set(history.rows[0])
    still = [k for k, v in model.named_parameters() if torch.equal(v, before[k])]
    assert not still


def two(first: nn.Module, other: nn.Module) -> Sequence[nn.Module]:
    return [first, other]


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        (lambda: [Residual()], "found 1 networks to teach each other"),
        (lambda: two(Residual(), Residual(classes=5)), "found branches that differ at 'fc'"),
        (
            lambda: [nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)) for _ in range(2)],
            "found a network with one stage of maps",
        ),
        (
            lambda: [add_exits(Residual(), [default_exit_point(Residual(), SHAPE)], 4, SHAPE) for _ in range(2)],
            "found a network of several classifiers",
        ),
    ],
)
def test_refusals(networks: Callable[[], Sequence[nn.Module]], message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        gated(networks(), SHAPE)
