"""The loss of self-distillation by hand: distances, divergences, the paper's loss and the public code's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.distillation.paths import batch_distance, self_features, self_kd, squared_distance
from shoal.exits.attention import add_aligned_exits, feature_taps
from shoal.exits.points import exit_points
from shoal.networks.spec import Spec
from shoal.outputs import Outputs, forward
from shoal.recipes import self_distill
from shoal.recipes.self_distill import objective_terms, taught_network
from shoal.training.objective import Objective, Term
from tests.conftest import Residual

SHAPE = (1, 8, 8)
SPEC = Spec("given", 4, SHAPE)

# Three classifiers on 3 samples x 4 classes, and their features on 3 samples x 2
LOGITS = [
    [[1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 0.0, 0.0], [-1.0, 1.0, 0.5, 0.0]],
    [[2.0, 0.0, 0.0, 1.0], [0.5, 1.5, 0.0, -0.5], [0.0, 1.0, 1.0, 0.0]],
    [[3.0, -1.0, 0.0, 0.0], [0.0, 3.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0]],
]
FEATURES = {"a": [[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]], "b": [[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]]}
FEATURES["c"] = [[0.0, 2.0], [0.0, 4.0], [1.0, 2.0]]
LABELS = torch.tensor([0, 1, 2])


def outputs() -> Outputs:
    logits = tuple(torch.tensor(rows, requires_grad=True) for rows in LOGITS)
    return Outputs(logits, {name: torch.tensor(rows, requires_grad=True) for name, rows in FEATURES.items()})


def value(term: Term, given: Outputs | None = None) -> float:
    return float(term.loss(given or outputs(), None, LABELS).detach())


# Squared distances a-b: 1, 1, 9; a-c: 1, 9, 8; b-c: 4, 10, 5. Sums 11, 18, 19; means 11/3, 18/3, 19/3.
# Means of features: (1, 2), (1/3, 2), (4/3, 2/3); from a: 0, 10/9, 29/9; from b: 1, 13/9, 20/9.
DISTANCES = [
    ("deepest", "squared", 18 / 3 + 19 / 3),
    ("transitive", "squared", 11 / 3 + 19 / 3),
    ("dense", "squared", (11 / 3 + 18 / 3) / 2 + 19 / 3),
    ("dense-sum", "squared", 11 / 3 + 18 / 3 + 19 / 3),
    ("ensemble", "squared", (39 / 9 + 42 / 9) / 3),
    ("deepest", "batch-norm", 18**0.5 + 19**0.5),
    ("transitive", "batch-norm", 11**0.5 + 19**0.5),
]


@pytest.mark.parametrize(("path", "form", "expected"), DISTANCES)
def test_feature_distances_by_hand(path: str, form: str, expected: float) -> None:
    assert value(self_features(path, ("a", "b", "c"), 1.0, form=form)) == pytest.approx(expected, abs=1e-6)


def test_skipped_students_learn_no_features_and_adapted_ones_show_their_adapters() -> None:
    assert value(self_features("deepest", ("a", "b", "c"), 1.0, skipped=(1,))) == pytest.approx(18 / 3, abs=1e-6)
    term = self_features("deepest", ("a", "b", "c"), 1.0, adapted={0: "b"}, skipped=(1,))
    assert value(term) == pytest.approx(19 / 3, abs=1e-6)
    assert term.own == ("a", "b", "c")


def kl(teacher: int, student: int, temperature: float = 3.0) -> float:
    p, q = (torch.softmax(torch.tensor(LOGITS[i]).double() / temperature, 1) for i in (teacher, student))
    return float((p * (p / q).log()).sum(1).mean())


PATHS = [
    ("deepest", lambda: kl(2, 0) + kl(2, 1)),
    ("transitive", lambda: kl(1, 0) + kl(2, 1)),
    ("dense", lambda: (kl(1, 0) + kl(2, 0)) / 2 + kl(2, 1)),
    ("dense-sum", lambda: kl(1, 0) + kl(2, 0) + kl(2, 1)),
]


@pytest.mark.parametrize(("path", "expected"), PATHS)
@pytest.mark.parametrize("squared", [True, False])
def test_divergences_by_hand(path: str, expected: Any, squared: bool) -> None:
    factor = 9 if squared else 1
    assert value(self_kd(path, 3, 1.0, 3.0, squared=squared)) == pytest.approx(factor * expected(), abs=1e-6)


@pytest.mark.parametrize("path", ["deepest", "transitive", "dense", "dense-sum", "ensemble"])
def test_gradients_reach_students_only(path: str) -> None:
    terms = (self_kd(path, 3, 1.0, 3.0), self_features(path, ("a", "b", "c"), 1.0))
    for term in terms:
        given = outputs()
        term.loss(given, None, LABELS).backward()
        values = list(given.logits) if term.name == "self_kd" else list(given.taps.values())
        assert [v.grad is not None and bool(v.grad.abs().sum() > 0) for v in values] == [True, True, False]


def test_equal_features_have_a_finite_gradient() -> None:
    for distance in (squared_distance, batch_distance):
        x = torch.ones(3, 2, requires_grad=True)
        distance(x, torch.ones(3, 2)).backward()
        assert x.grad is not None
        assert (x.grad == 0).all()


def test_the_papers_loss_by_hand() -> None:
    """Eq. 3 to 5: alpha 0.6, lambda 0.04, temperature 3 with its square, mean over 3 classifiers."""
    model = aligned()
    taps = feature_taps(model)
    given = outputs()
    known = Outputs(given.logits, dict(zip(taps, given.taps.values(), strict=True)))
    preset = self_distill.paper()
    objective = Objective(objective_terms(model, preset))
    entropies = [float(nn.functional.cross_entropy(z.detach(), LABELS)) for z in given.logits]
    taught = 0.4 * sum(entropies[:2]) + entropies[2] + 0.6 * 9 * (kl(2, 0) + kl(2, 1)) + 0.04 * (18 + 19) / 3
    for epoch, expected in ((0, taught), (294, taught), (295, sum(entropies)), (299, sum(entropies))):
        objective.on_epoch_start(model, epoch)
        assert float(objective(known, None, LABELS)[0].detach()) == pytest.approx(expected / 3, abs=1e-6)


def test_the_public_codes_loss_by_hand() -> None:
    """Sums over classifiers, no square of the temperature, and no features of the deepest shallow one."""
    model = aligned()
    taps = feature_taps(model)
    given = outputs()
    known = Outputs(given.logits, dict(zip(taps, given.taps.values(), strict=True)))
    entropies = [float(nn.functional.cross_entropy(z.detach(), LABELS)) for z in given.logits]
    expected = 0.7 * sum(entropies[:2]) + entropies[2] + 0.3 * (kl(2, 0) + kl(2, 1)) + 0.03 * 18**0.5
    objective = Objective(objective_terms(model, self_distill.reference_code()))
    for epoch in (0, 249):
        objective.on_epoch_start(model, epoch)
        assert float(objective(known, None, LABELS)[0].detach()) == pytest.approx(expected, abs=1e-6)


def test_the_public_codes_gradients_by_hand() -> None:
    """The weakest classifier's features pass an adapter; the deepest shallow one learns from logits only."""
    taps, (name,) = ("a", "b", "c"), ("adapter",)
    given, weight = outputs(), torch.tensor([[1.0, 0.5], [-1.0, 2.0]], requires_grad=True)
    known = Outputs(given.logits, given.taps | {name: given.taps["a"] @ weight.T})
    preset = self_distill.reference_code()
    terms = objective_terms(aligned(), preset)
    features = self_features(
        preset.path, taps, preset.feature_weight, form=preset.distance, adapted={0: name}, skipped=(1,)
    )
    objective = Objective((*terms[:-1], features))
    objective.on_epoch_start(nn.Identity(), 0)
    objective(known, None, LABELS)[0].backward()

    one_hot, (soft, hard) = nn.functional.one_hot(LABELS, 4), (logit_softmax(3.0), logit_softmax(1.0))
    for i, alpha in enumerate((0.3, 0.3, 0.0)):
        wanted = ((1 - alpha) * (hard[i] - one_hot) + alpha / 3 * (soft[i] - soft[2])) / 3
        assert torch.allclose(grad(given.logits[i]), wanted, atol=1e-6)
    apart = (known.taps[name] - given.taps["c"]).detach()
    direction = 0.03 * apart / apart.square().sum().sqrt()
    assert torch.allclose(grad(given.taps["a"]), direction @ weight.detach(), atol=1e-6)
    assert torch.allclose(grad(weight), direction.T @ given.taps["a"].detach(), atol=1e-6)
    assert given.taps["b"].grad is None
    assert given.taps["c"].grad is None


def logit_softmax(temperature: float) -> list[Tensor]:
    return [torch.softmax(torch.tensor(rows) / temperature, 1) for rows in LOGITS]


def grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("count", [2, 3])
def test_the_public_code_adapts_all_students_of_features_but_the_deepest(count: int) -> None:
    """The recipe's own network: one linear layer for each shallow classifier that learns features."""
    spec = replace(SPEC, exits=("relu", "act_2", "relu_2")[:count], exit_kind="aligned")
    model, terms = taught_network(spec, Residual(), self_distill.reference_code())
    adapters = [name for name in dict(model.named_modules()) if name.endswith(".adapter")]
    taught = feature_taps(model)[: count - 1]
    assert adapters == [tap.removesuffix("features") + "adapter" for tap in taught]
    assert set(adapters) < set(terms[-1].own)
    given = forward(model, torch.randn(3, *SHAPE), terms[-1].own)
    wanted = sum(
        float((given.taps[own] - given.taps[feature_taps(model)[-1]]).detach().square().sum().sqrt())
        for own in adapters
    )
    assert value(terms[-1], given) == pytest.approx(wanted, rel=1e-5)


def aligned() -> nn.Module:
    """A network of three classifiers."""
    torch.manual_seed(0)
    plain = Residual()
    return add_aligned_exits(plain, (*exit_points(plain, SHAPE, "shallow", 1), "relu_2"), 4, SHAPE)
