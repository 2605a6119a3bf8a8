"""Self-distillation beside another teacher, and networks that have several classifiers of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.data.augment import augment_batch
from shoal.data.dataset import Split
from shoal.errors import ShoalError
from shoal.exits.attention import add_aligned_exits
from shoal.exits.classifiers import add_exits, count_exits
from shoal.exits.figures import exit_figures
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.outputs import Outputs, forward
from shoal.recipes import beside, inplace
from shoal.recipes.self_distill import Options, Preset, check_options, distill, objective_terms
from shoal.recipes.stages import Stages, check_teacher
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.conftest import Residual, blobs

SHAPE, DATA = (1, 8, 8), blobs(64)
SPEC = Spec("given", 4, SHAPE)
PLAN = Preset(Schedule(3, 0.05, batch_size=32), release=1)
GROWN = replace(SPEC, exits=("relu",), exit_kind="aligned")
LABELS = torch.tensor([0, 1, 2, 3])


class TwoHeads(nn.Module):
    """Classifiers of its own after the first and after the last ReLU; `early` gives the first one its place."""

    def __init__(self, early: bool = True, odd: bool = False) -> None:
        super().__init__()
        self.early, self.odd = early, odd
        self.first, self.relu1 = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()
        self.second, self.relu2 = nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU()
        self.third, self.relu3 = nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU()
        self.weak, self.fc = nn.Linear(4, 2 if odd else 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.relu1(self.first(x))
        if self.early:
            weak = self.weak(y.mean((2, 3)))
        z = self.relu3(self.third(self.relu2(self.second(y))))
        if not self.early:
            weak = self.weak(y.mean((2, 3)))
        return weak, self.fc(z.mean((2, 3)))


@pytest.mark.parametrize("early", [True, False])
def test_exits_stand_in_the_order_of_depth_beside_a_networks_own(early: bool) -> None:
    torch.manual_seed(0)
    model = TwoHeads(early).eval()
    grown = add_exits(model, ["relu2", "relu1"], 4, SHAPE).eval()
    x = torch.randn(3, *SHAPE)
    found, own = grown(x), model(x)
    assert len(found) == 4
    places = [i for i, z in enumerate(found) if any(torch.equal(z, y) for y in own)]
    assert places == [0, 3]
    assert torch.equal(found[3], own[1])


@pytest.mark.parametrize(
    ("after", "message"),
    [(["relu", "relu"], "found a site twice"), (["fc"], "found no feature map at 'fc'"), (["no"], "found no site")],
)
def test_exits_without_a_place_of_their_own(after: list[str], message: str) -> None:
    for add in (add_exits, add_aligned_exits):
        with pytest.raises(ShoalError, match=message):
            add(Residual(), after, 4, SHAPE)


def test_a_submodule_with_an_exits_name_keeps_it() -> None:
    class Final(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.final = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.c2(self.c1(self.final(self.stem(x)))).mean((2, 3)))

    class Alike(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.a_b, self.a = nn.ReLU(), nn.ModuleDict({"b": nn.Sequential(nn.Conv2d(4, 5, 1), nn.ReLU())})
            self.last = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.a["b"](self.a_b(self.stem(x))).mean((2, 3)))

    assert count_exits(add_aligned_exits(Final(), ["final"], 4, SHAPE)) == 2
    check_options(Options(after=("final",), kind="aligned"), PLAN, SPEC, Final())
    grown = add_exits(Alike(), ["a_b", "a.b.1"], 4, SHAPE)
    assert [z.shape for z in grown(torch.randn(2, *SHAPE))] == [(2, 4)] * 3


def test_networks_of_several_classifiers_and_cut_ones_are_not_taught() -> None:
    with pytest.raises(ShoalError, match="found 2 classifiers in 'given'"):
        check_options(Options(), PLAN, SPEC, TwoHeads())
    with pytest.raises(ShoalError, match="found a result of shape"):
        inplace.check_options(inplace.Options(), SPEC, TwoHeads(odd=True))
    with pytest.raises(ShoalError, match="reduced already"):
        check_teacher(replace(SPEC, kept_exit=0))
    for options, message in (
        (Options(after=("relu",), count=2), "found a count of exits and their sites"),
        (Options(path="dense", alpha=0.0, feature_weight=0.0), "found a path and nothing that is taught"),
    ):
        with pytest.raises(ShoalError, match=message):
            check_options(options, options.applied(PLAN), SPEC, Residual())


def test_sites_are_listed_by_depth_and_figures_leave_the_mode() -> None:
    grown = check_options(Options(after=("relu_2", "relu"), kind="aligned"), PLAN, SPEC, Residual())
    assert grown.exits == ("relu", "relu_2")
    model = assemble(grown, Residual()).eval()
    x = torch.randn(4, *SHAPE)
    before = model(x)
    exit_figures(model, DATA, DATA.test, Settings())
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model(x), strict=True))


def test_a_presets_augmentation_and_split_are_those_of_its_training(monkeypatch: pytest.MonkeyPatch) -> None:
    policies, splits = set[str](), set[str]()

    def augmented(images: Tensor, policy: str, generator: torch.Generator) -> Tensor:
        policies.add(policy)
        return augment_batch(images, policy, generator)

    def judge(loop: Any) -> Split:
        splits.add(loop.settings.select)
        return DATA.val

    monkeypatch.setattr("shoal.training.batches.augment_batch", augmented)
    monkeypatch.setattr("shoal.training.loop._Loop._split", judge)
    plan = replace(PLAN, augment="crop", select="train", schedule=replace(PLAN.schedule, epochs=2))
    distill(SPEC, Options("every-layer"), plan, Stages(DATA, Settings()), base=Residual())
    assert (policies, splits) == ({"crop"}, {"train"})


def made() -> tuple[nn.Module, tuple[Any, ...]]:
    model = assemble(GROWN, Residual())
    return model, objective_terms(model, PLAN)


def loss_of(lesson: Any, x: Tensor, name: str) -> tuple[Any, Outputs]:
    term = next(t for t in lesson.terms if t.name == name)
    student = forward(lesson.model, x, (*term.taps, *term.own))
    theirs = forward(lesson.teacher, x, term.taps) if lesson.teacher is not None else None
    return term.loss(student, theirs, LABELS), student


@pytest.mark.parametrize("by", beside.BESIDE)
def test_another_teacher_teaches_the_student_and_learns_nothing(by: str) -> None:
    torch.manual_seed(0)
    teacher = None if by == "dml" else Residual().eval()
    own = beside.lesson(by, made, Residual(), teacher, SHAPE)
    x = torch.randn(4, *SHAPE)
    value, student = loss_of(own, x, {"kd": "kd", "at": "attention", "dml": "mutual"}[by])
    value.backward()
    assert value.detach() > 0
    if teacher is not None:
        assert own.teacher is not None
        assert all(p.grad is None for p in own.teacher.parameters())
    else:
        assert len(student.logits) == 4
        first, second = student.final, student.logits[1]
        expected = _kl(first, second) + _kl(second, first)
        assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    cut = own.cut(own.model)
    assert set(cut.state_dict()) == set(made()[0].state_dict())
    assert own.model.get_parameter("networks.1.stem.weight" if by == "dml" else "stem.weight").grad is not None


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    p = teacher.detach().softmax(1)
    return (p * (p.log() - student.log_softmax(1))).sum(1).mean()


def test_each_peer_learns_from_its_own_classifiers() -> None:
    """Every term of one network alone has the value that it has among peers."""
    torch.manual_seed(0)
    own = beside.lesson("dml", made, Residual(), None, SHAPE)
    x = torch.randn(4, *SHAPE)
    for i, network in enumerate(own.model.networks):  # type: ignore[union-attr, arg-type]
        for term in objective_terms(network, PLAN):
            among, _ = loss_of(own, x, f"networks.{i}.{term.name}")
            assert torch.equal(among, term.loss(forward(network, x, term.own), None, LABELS))


@pytest.mark.parametrize(
    ("by", "teacher", "message"),
    [
        ("kd", None, "found no teacher and kd"),
        ("dml", Residual(), "found a teacher and dml"),
        (None, Residual(), "found a teacher and no way"),
        ("best", None, "found teacher beside 'best'"),
    ],
)
def test_teachers_and_ways_go_together(by: str | None, teacher: nn.Module | None, message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        check_options(Options("every-layer", beside=by), PLAN, SPEC, Residual(), teacher)


@pytest.mark.slow
def test_the_command_takes_a_teacher_of_the_same_images(tmp_path: Path) -> None:
    def call(*words: object) -> dict[str, Any]:
        result = CliRunner().invoke(app, [str(w) for w in (*words, "--json")], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return dict(json.loads(result.stdout))

    small = ("tests.conftest:Residual", "--data", "digits", "--limit", 200, "--epochs", 2)
    call("train", *small, "--out", tmp_path / "teacher")
    for by in beside.BESIDE:
        words = ("self-distill", *small, "--beside", by, "--no-baseline", "--out", tmp_path / by)
        given = () if by == "dml" else ("--teacher", tmp_path / "teacher")
        body = call(*words, *given)
        assert body["exits"] == call(*words, *given, "--resume")["exits"]
        assert json.loads((tmp_path / by / "exits.json").read_text())["selected_on"] == "val"
    taught = ("--beside", "kd", "--teacher", tmp_path / "teacher", "--out", tmp_path / "no")
    with pytest.raises(ShoalError, match="found --seed 1 and a teacher of seed 0"):
        call("self-distill", *small, "--seed", 1, *taught)
    assert not (tmp_path / "no").exists()
