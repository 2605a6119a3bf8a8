"""Every method of distillation as a recipe on the one loop: trained, cut back, resumed, refused."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from shoal.distillation.neighbours import Neighbourhood
from shoal.errors import ShoalError, StoppedError
from shoal.models import build
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.recipes import comparators, osakd
from shoal.recipes.comparators import METHODS, check_options, method
from shoal.recipes.from_teacher import Options
from shoal.recipes.lessons import Problem, Result, Teach, learn
from shoal.recipes.stages import Stages
from shoal.storage.run import Run
from shoal.surgery.normal_form import drop_unread
from shoal.training.evaluation import evaluate
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.conftest import Residual, blobs

DATA, SHAPE = blobs(64), (1, 8, 8)
PLAN = Schedule(2, 0.02, batch_size=16)
SPEC = Spec("resnet20", 4, SHAPE, width=0.25)
ASSISTANT = replace(SPEC, base="resnet32")


@functools.cache
def trained() -> nn.Module:
    torch.manual_seed(5)
    model = build("resnet32", 4, channels=1, width=0.5)
    fit(model, DATA, Objective((cross_entropy(),)), replace(PLAN, epochs=3))
    return model.eval()


def teacher() -> nn.Module:
    return copy.deepcopy(trained())


def options(name: str) -> Options:
    found = METHODS[name]
    return Options(teacher() if found.teacher else None, ASSISTANT if found.assistant else None)


def teach(name: str) -> Teach:
    if name == "osakd":
        return osakd.teach(osakd.Options(Neighbourhood(4, bank=32)), osakd.quick())
    return comparators.teach(name, options(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["osakd", *METHODS])
def test_a_method_trains_its_network_and_is_cut_away(name: str) -> None:
    given = options(name) if name != "osakd" else Options()
    before = {} if given.teacher is None else {k: v.clone() for k, v in given.teacher.state_dict().items()}
    make = comparators.teach(name, given) if name != "osakd" else teach(name)
    result = learn(Problem(SPEC, PLAN, Stages(DATA, Settings())), make)
    plain = assemble(SPEC)
    plain.load_state_dict(result.model.state_dict())  # the names of the network itself, and no others
    x = DATA.normalise(DATA.test.images)
    assert torch.allclose(plain.eval()(x), result.model(x), rtol=1e-4, atol=1e-5)
    logits = result.whole(x)
    first = logits[0] if isinstance(logits, tuple) else logits
    assert torch.allclose(first, result.model(x), rtol=1e-4, atol=1e-5)
    rows = result.histories["distill"].rows
    assert len(rows) == len(result.histories["baseline"].rows) == PLAN.epochs
    assert all(float(v) == float(v) for v in rows[-1].values())
    if given.teacher is not None:
        assert all(torch.equal(v, before[k]) for k, v in given.teacher.state_dict().items())


@pytest.mark.parametrize("name", ["osakd", *METHODS])
def test_the_lesson_begins_with_the_weights_of_the_baseline(name: str) -> None:
    """Both are drawn by the seed; what a method adds is drawn after them."""
    stages = Stages(DATA, Settings(seed=3))
    problem = Problem(SPEC, replace(PLAN, epochs=1), stages)
    make = teach(name)
    torch.manual_seed(3)
    lesson = make(problem)
    torch.manual_seed(3)
    baseline = problem.network()
    own = lesson.cut(lesson.model).state_dict()
    assert set(own) == set(baseline.state_dict())
    assert all(torch.equal(own[k], v) for k, v in baseline.state_dict().items())


def state_of(result: Result) -> dict[str, torch.Tensor]:
    return dict(result.whole.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["osakd", "overhaul", "ffl", "takd"])
def test_a_resumed_run_ends_as_an_unbroken_one(name: str, tmp_path: Path) -> None:
    """Ramps follow the epoch; the bank is in the checkpoint; adapters and fusion have their momentum."""
    config = {"data": "blobs", "seed": 0, "limit": None, "data_dir": None}
    unbroken = learn(Problem(SPEC, PLAN, Stages(DATA, Settings(), Run.create(tmp_path / "a", config))), teach(name))
    run = Run.create(tmp_path / "b", config)
    ended = 0

    def stop() -> bool:
        nonlocal ended
        ended += 1
        return ended > 1

    with pytest.raises(StoppedError):
        learn(Problem(SPEC, PLAN, Stages(DATA, Settings(stop=stop), run)), teach(name))
    again = learn(Problem(SPEC, PLAN, Stages(DATA, Settings(resume=True), run)), teach(name))
    a, b = state_of(unbroken), state_of(again)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(v, again.baseline.state_dict()[k]) for k, v in unbroken.baseline.state_dict().items())


def test_osakd_learns_and_its_terms_add_up_to_one() -> None:
    problem = Problem(SPEC, PLAN, Stages(DATA, Settings()))
    for balance, expected in ((None, (0.9, 0.1)), (0.99, (0.99, 0.01))):
        lesson = osakd.teach(osakd.Options(Neighbourhood(4), balance=balance), osakd.quick())(problem)
        assert tuple(t.weight for t in lesson.terms) == pytest.approx(expected)
    longer = replace(PLAN, epochs=8, lr=0.1)
    result = learn(Problem(SPEC, longer, Stages(DATA, Settings())), teach("osakd"))
    assert evaluate(result.model, DATA, DATA.test)[0] > 60


def test_presets_of_the_paper() -> None:
    paper, tiny, resnet = osakd.paper(), osakd.paper_tiny_imagenet(), osakd.paper_resnet()
    assert (paper.schedule.lr, paper.schedule.momentum, paper.schedule.batch_size, paper.schedule.epochs) == (
        1e-3, 0.9, 64, 100,
    )  # fmt: skip
    assert (paper.balance, tiny.balance) == (0.9, 0.99)
    assert [resnet.schedule.rate(e) for e in (0, 149, 150, 225)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert resnet.schedule.nesterov


def test_a_users_own_network_is_drawn_anew() -> None:
    torch.manual_seed(0)
    own = Residual()
    result = learn(
        Problem(Spec("given", 4, SHAPE), replace(PLAN, epochs=1), Stages(DATA, Settings()), own), teach("one")
    )
    assert set(result.model.state_dict()) == set(result.baseline.state_dict())
    networks = result.whole.state_dict()
    assert not torch.equal(networks["branches.1.c2.weight"], networks["branches.2.c2.weight"])


@pytest.mark.slow
def test_adapters_are_the_published_ones() -> None:
    """FitNet: one 1x1 regressor at stage 2; overhaul: a connector and margins for each stage."""
    problem = Problem(SPEC, PLAN, Stages(DATA, Settings()))
    fitnet, overhaul = (teach(name)(problem) for name in ("fitnet", "overhaul"))
    extra = {k: tuple(v.shape) for k, v in fitnet.model.named_parameters() if k.startswith("hints")}
    assert extra.pop("hints.0.0.weight") == (16, 8, 1, 1)
    assert extra == dict.fromkeys(("hints.0.0.bias", "hints.0.1.weight", "hints.0.1.bias"), (16,))
    assert sum(k.endswith("0.weight") for k in overhaul.model.state_dict() if k.startswith("hints")) == 3
    assert overhaul.teacher is not None
    margins = [v for k, v in overhaul.teacher.state_dict().items() if k.startswith("hints")]
    assert [tuple(m.shape) for m in margins] == [(1, c, 1, 1) for c in (8, 16, 32)]
    assert all((m < 0).all() for m in margins)
    assert set(drop_unread(overhaul.teacher).state_dict()) == set(teacher().state_dict())


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("crd", Options(), "found method 'crd'; need one of kd, "),
        ("kd", Options(), "found no teacher for method 'kd'; need one"),
        ("dml", Options(teacher=Residual()), "found one teacher for method 'dml'; need none"),
        ("takd", Options(teacher=Residual()), "found no assistant for method 'takd'"),
        ("kd", Options(Residual(), ASSISTANT), "found one assistant for method 'kd'; need none"),
        ("kd", Options(Residual(), branches=2), "found 2 branches for method 'kd'; need none"),
        ("one", Options(branches=1), "found 1 networks to teach each other"),
        ("kd", Options(Residual(classes=7)), "found a teacher without logits for 4 classes"),
        ("takd", Options(Residual(), replace(ASSISTANT, classes=7)), "found an assistant for 7 classes"),
    ],
)
def test_refusals(name: str, given: Options, message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        check_options(name, given, SPEC)


def test_networks_of_other_stages_are_refused() -> None:
    problem = Problem(SPEC, PLAN, Stages(DATA, Settings()))
    four = Options(build("resnet10", 4, channels=1, width=0.125))
    for name in ("at", "fitnet", "overhaul"):
        with pytest.raises(ShoalError, match="found 3 stages in the student and 4 in the teacher"):
            method(name).lesson(problem, four)
    for name in ("kd", "spkd", "rkd"):
        method(name).lesson(problem, four)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (osakd.Options(Neighbourhood(16)), "found k 16 with 16 samples in a batch"),
        (osakd.Options(Neighbourhood(4), loss="l1"), "found loss 'l1'"),
        (osakd.Options(Neighbourhood(4), balance=1.0), "found lambda 1.0"),
    ],
)
def test_osakd_refusals(asked: osakd.Options, message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        osakd.check_options(asked, DATA, PLAN)


def test_a_reduced_network_is_refused() -> None:
    with pytest.raises(ShoalError, match="found a network that has been reduced already"):
        learn(Problem(replace(SPEC, widths=(0.5, 1.0)), PLAN, Stages(DATA, Settings())), teach("dml"))
