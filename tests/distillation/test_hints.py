"""Feature losses against values by hand, and adapters that leave a network as it was."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor, nn

from shoal.distillation.adapters import (
    Feature,
    MarginReLU,
    attach,
    connector,
    embedding,
    expected_negative,
    feature_shape,
    margins,
    regressor,
    stage_ends,
)
from shoal.distillation.hints import attention, fitnet, matched, overhaul, relations, similarity
from shoal.errors import ShoalError
from shoal.models import build
from shoal.outputs import Outputs, forward
from shoal.surgery.normal_form import drop_unread
from shoal.surgery.traced import Traced
from shoal.training.objective import Term
from tests.conftest import Residual, randomise
from tests.support.quick_networks import ONE_CLASSIFIER

SHAPE = (1, 8, 8)
LABELS = torch.tensor([0, 1, 3])
STUDENT = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
TEACHER = torch.tensor([[0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
"""Distances of the teacher's rows: 5, 3 and 4, whose mean is 4; of the student's: sqrt 5, sqrt 5 and sqrt 8."""


def value(term: Term, student: Tensor, teacher: Tensor) -> float:
    side = [Outputs((STUDENT,), dict.fromkeys(term.taps, x)) for x in (student, teacher)]
    return float(term.loss(side[0], side[1], LABELS))


def as_map(x: Tensor) -> Tensor:
    """Three samples with two channels of 2x1."""
    return x.reshape(3, 2, 2, 1)


def huber(gap: float) -> float:
    return 0.5 * gap**2 if abs(gap) < 1 else abs(gap) - 0.5


def test_fitnet_by_hand() -> None:
    # 1 + 9; 4 + 16; 4 over twelve values.
    assert value(fitnet("a"), as_map(STUDENT), as_map(TEACHER)) == pytest.approx(34 / 12, abs=1e-6)
    assert fitnet("a").weight == 100


def test_attention_by_hand() -> None:
    """Channel means of squares, as vectors of length 1: student (1,0), (0,1), (0,1); teacher (0,1), (1,0), (0,0)."""
    expected = (2 + 2 + 1) / 6
    assert value(attention(["a"]), as_map(STUDENT), as_map(TEACHER)) == pytest.approx(expected, abs=1e-6)
    assert value(attention(["a", "b"]), as_map(STUDENT), as_map(TEACHER)) == pytest.approx(2 * expected, abs=1e-6)
    assert attention(["a"]).weight == 1000


def test_similarity_by_hand() -> None:
    """The student's samples are orthogonal: G_s is the identity; the teacher's third is 0: so is its row."""
    assert value(similarity("a"), as_map(STUDENT), as_map(TEACHER)) == pytest.approx(1 / 9, abs=1e-6)
    turned = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    rows = [[1, 1, 0], [1, 2, 1], [0, 1, 1]]
    scaled = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]
    expected = sum((scaled[i][j] - (i == j)) ** 2 for i in range(3) for j in range(3)) / 9
    assert value(similarity("a"), STUDENT, turned) == pytest.approx(expected, abs=1e-6)
    assert similarity("a").weight == 3000


def test_relational_distance_by_hand() -> None:
    mean = (2 * math.sqrt(5) + math.sqrt(8)) / 3
    gaps = [math.sqrt(5) / mean - 5 / 4, math.sqrt(5) / mean - 3 / 4, math.sqrt(8) / mean - 4 / 4]
    expected = 2 * sum(huber(g) for g in gaps) / 9  # each pair twice, and nothing on the diagonal
    found = value(relations("a", distance=1, angle=0), STUDENT, TEACHER)
    assert found == pytest.approx(expected, abs=1e-6)


def cosines(points: list[list[float]]) -> list[float]:
    """At each point i, between the directions to j and to k; 0 where one of them is i."""
    found = []
    for a in points:
        for b in points:
            for c in points:
                u, v = [q - p for p, q in zip(a, b, strict=True)], [q - p for p, q in zip(a, c, strict=True)]
                norm = math.hypot(*u) * math.hypot(*v)
                found.append(sum(p * q for p, q in zip(u, v, strict=True)) / norm if norm else 0.0)
    return found


def test_relational_angle_by_hand() -> None:
    pairs = zip(cosines(STUDENT.tolist()), cosines(TEACHER.tolist()), strict=True)
    expected = sum(huber(a - b) for a, b in pairs) / 27
    assert value(relations("a", distance=0, angle=1), STUDENT, TEACHER) == pytest.approx(expected, abs=1e-6)
    both = 25 * value(relations("a", distance=1, angle=0), STUDENT, TEACHER) + 50 * expected
    assert value(relations("a"), STUDENT, TEACHER) == pytest.approx(both, abs=1e-5)


def test_overhaul_by_hand() -> None:
    """Of (student, teacher): (-1, 2) and (3, 2) count; (1, -1) counts, the student is above; (-2, -1) does not."""
    student, teacher = torch.zeros(3, 4), torch.zeros(3, 4)
    student[0], teacher[0] = torch.tensor([-1.0, 3.0, 1.0, -2.0]), torch.tensor([2.0, 2.0, -1.0, -1.0])
    once = (9 + 1 + 4) / 3
    assert value(overhaul(["a"]), as_map(student), as_map(teacher)) == pytest.approx(once, abs=1e-6)
    assert value(overhaul(["a", "b", "c"]), as_map(student), as_map(teacher)) == pytest.approx(1.75 * once, abs=1e-6)
    assert overhaul(["a"]).weight == 1e-3


TERMS = {
    "fitnet": fitnet("a"),
    "attention": attention(["a"]),
    "similarity": similarity("a"),
    "relations": relations("a"),
    "overhaul": overhaul(["a"]),
}


@pytest.mark.parametrize("name", TERMS)
def test_gradients_reach_the_student_only_and_are_finite(name: str) -> None:
    student, teacher = (torch.randn(4, 3, 2, 2, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        student[1] = student[0]  # no distance between two samples
    sides = [Outputs((), {"a": x}) for x in (student, teacher)]
    TERMS[name].loss(sides[0], sides[1], torch.zeros(4)).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert student.grad.abs().max() < 1e4


@pytest.mark.parametrize("name", TERMS)
def test_a_student_like_its_teacher_has_nothing_to_learn(name: str) -> None:
    x = torch.randn(4, 3, 2, 2)
    sides = [Outputs((), {"a": x}) for _ in range(2)]
    assert float(TERMS[name].loss(sides[0], sides[1], torch.zeros(4))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_no_teacher_is_refused(name: str) -> None:
    with pytest.raises(ShoalError, match="found no teacher"):
        TERMS[name].loss(Outputs((), {"a": torch.randn(2, 2, 2, 2)}), None, LABELS)


def test_the_larger_map_is_pooled() -> None:
    large, small = torch.arange(16.0).reshape(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)
    for pair in (matched(large, small), matched(small, large)):
        means = max(pair, key=lambda x: float(x.sum()))
        assert means.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
        assert min(pair, key=lambda x: float(x.sum())).shape == (1, 1, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_CLASSIFIER)
def test_adapters_change_nothing_and_go(name: str) -> None:
    shape = (3, 16, 16)
    model = randomise(build(name, 5, width=0.0625))
    traced = Traced(model, shape)
    ends = stage_ends(traced)
    made = {f"stage{i}": (Feature(end), regressor(feature_shape(traced, Feature(end))[0], 7))
            for i, end in enumerate(ends)}  # fmt: skip
    made["embedding"] = (embedding(traced), nn.Identity())
    grown, x = attach(model, shape, made), torch.randn(2, *shape)
    found = forward(grown, x, [f"hints.{k}" for k in made])
    assert torch.equal(found.final, forward(grown, x).final)
    assert (found.final - model(x)).abs().max() < 1e-5
    assert all(found.taps[f"hints.stage{i}"].shape[1] == 7 for i in range(len(ends)))
    assert (model.get_submodule(embedding(traced).site)(found.taps["hints.embedding"]) - model(x)).abs().max() < 1e-5
    plain = drop_unread(grown)
    assert set(model.state_dict()) >= set(plain.state_dict())
    assert not any(k.startswith("hints") for k in plain.state_dict())
    assert (plain(x) - model(x)).abs().max() < 1e-5


def test_before_is_what_the_relu_receives(residual: nn.Module) -> None:
    end = stage_ends(Traced(residual, SHAPE))[-1]
    adapters = {"before": (Feature(end, before=True), nn.Identity()), "after": (Feature(end), nn.Identity())}
    taps = forward(attach(residual, SHAPE, adapters), torch.randn(2, *SHAPE), ["hints.before", "hints.after"]).taps
    assert (taps["hints.before"] < 0).any()
    assert torch.equal(taps["hints.before"].relu(), taps["hints.after"])


def test_adapters_train_with_the_student(residual: nn.Module) -> None:
    end = stage_ends(Traced(residual, SHAPE))[-1]
    student = attach(residual.train(), SHAPE, {"a": (Feature(end), connector(8, 3))})
    assert student.training
    assert all(m.training for m in student.modules())
    found = forward(student, torch.randn(4, *SHAPE), ["hints.a"])
    found.taps["hints.a"].square().sum().backward()
    gradients = {n: p.grad for n, p in student.named_parameters()}
    assert gradients["stem.weight"] is not None
    assert gradients["hints.a.0.weight"] is not None
    assert gradients["fc.weight"] is None


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.4, -0.5), (-1.5, 0.7), (6.0, 1.0), (8.0, 0.5), (0.2, 0.0)])
def test_margin_is_the_mean_of_the_negative_part(shift: float, scale: float) -> None:
    norm = nn.BatchNorm2d(1)
    nn.init.constant_(norm.weight, scale)
    nn.init.constant_(norm.bias, shift)
    found = float(expected_negative(norm))
    size, normal = max(abs(scale), 1e-6), NormalDist()
    if shift / size < 7:
        expected = shift - size * normal.pdf(shift / size) / normal.cdf(-shift / size)
        assert found == pytest.approx(expected, abs=1e-6)
    else:  # almost never negative, and then hardly: the tail of the density falls off within scale^2 / shift
        assert found == pytest.approx(-(size**2) / shift, abs=1e-3)
    assert found <= 0


def test_margin_of_a_standard_normal() -> None:
    """E[x | x < 0] = -sqrt(2 / pi)."""
    assert float(expected_negative(nn.BatchNorm2d(1))) == pytest.approx(-math.sqrt(2 / math.pi), abs=1e-6)


def test_margins_come_from_the_norm_of_the_residual_branch() -> None:
    model = build("resnet10", 4, width=0.0625)
    nn.init.constant_(model.get_submodule("layer2.0.bn2").bias, 0.3)
    traced = Traced(model, (3, 16, 16))
    found = margins(traced, "layer2.0.relu2")
    assert torch.allclose(found, expected_negative(model.get_submodule("layer2.0.bn2")))  # type: ignore[arg-type]
    assert not torch.allclose(found, margins(traced, "layer2.0.relu1"))


def test_margin_relu() -> None:
    x = torch.tensor([[-3.0, 1.0], [-0.2, 2.0]]).reshape(1, 2, 2, 1)
    assert MarginReLU(torch.tensor([-1.0, -0.5]))(x).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.2, 2.0])


def test_refusals(residual: nn.Module) -> None:
    with pytest.raises(ShoalError, match="found no submodule 'other'"):
        attach(residual, SHAPE, {"a": (Feature("other"), nn.Identity())})
    with pytest.raises(ShoalError, match="found no batch norm before"):
        margins(Traced(build("osakd-cnn1", 10), (3, 32, 32)), "relu1")
    with pytest.raises(ShoalError, match="without scale and shift"):
        expected_negative(nn.BatchNorm2d(2, affine=False))
    with pytest.raises(ShoalError, match="found no stage with maps"):
        stage_ends(Traced(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)), SHAPE))
    with pytest.raises(ShoalError, match="need one linear layer at the end"):
        embedding(Traced(nn.Sequential(Residual(), nn.ReLU()), SHAPE))
