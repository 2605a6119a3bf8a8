"""One step, four ways: recorded and compiled steps give what eager ones give, and nothing in them waits."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.distillation.losses import kd, pram
from shoal.distillation.neighbours import Neighbourhood, NeighbourTeacher, neighbours
from shoal.errors import ShoalError, ShoalWarning
from shoal.networks.spec import Spec
from shoal.outputs import Outputs
from shoal.recipes import inplace, shallow
from shoal.recipes.stages import Stages, train_teacher
from shoal.reduction.learners import LEARNERS
from shoal.reduction.learners.senet import DifferenceLearner
from shoal.reduction.masks import add_masks
from shoal.reduction.sensitivity import DynamicRewiring
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy, switched
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.support.fits import DATA, OBJECTIVE, PLAN, SHAPE, full, masked, network, same
from tests.support.tables import fast_where
from tests.support.tapes import Again, Tapes, compilations

SPEC = Spec("given", 4, SHAPE)
EPOCHS = Schedule(3, 0.05, (2,), batch_size=32)
PLANS = replace(
    shallow.quick(), teacher=EPOCHS, sensitivity=replace(EPOCHS, epochs=2), mask=EPOCHS, finetune=EPOCHS, rewirings=4
)


COMPILE = torch.compile
COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")
"""PyTorch's compiler warns of PyTorch's own ways."""


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Tapes:
    """Steps are recorded as if CPUs had CUDA graphs."""
    made = Tapes()
    monkeypatch.setattr("shoal.training.stepping.recorder_for", lambda device: made)
    return made


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` traces both passes and leaves the kernels as they are, which takes a second and not a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def distilled(step: str, **more: Any) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """A fit with teacher, all loss terms, weights that change, augmentation and a mask learner."""
    torch.manual_seed(0)
    student, budget = masked()
    sites = list(budget.counts)
    objective = Objective((cross_entropy(0.5), kd(switched(0.5, 0.2, 1)), pram(1.0, sites)))
    settings = Settings(step=step, augment="crop-flip-cutout", **more)
    history = fit(
        student, DATA, objective, PLAN, teacher=add_masks(network(), full(student)), hooks=(DifferenceLearner(budget),),
        settings=settings,
    )  # fmt: skip
    return student.state_dict(), [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


@functools.cache
def eagerly_distilled() -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """What the other ways are compared with."""
    return distilled("eager")


def test_a_recorded_step_gives_the_same_bits(tapes: Tapes) -> None:
    weights, rows = eagerly_distilled()
    again, rows_again = distilled("graph")
    assert same(weights, again)
    assert rows == rows_again
    steps = PLAN.epochs * (len(DATA.train) // PLAN.batch_size)
    assert (tapes.recorded, tapes.played) == (1, steps - 1 - 3)  # once, after three steps


def test_a_hook_that_says_nothing_has_each_epoch_recorded_anew(tapes: Tapes) -> None:
    class Ending:
        taps: tuple[str, ...] = ()

        def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
            """Whatever it may do."""

    fit(network(), DATA, OBJECTIVE, PLAN, hooks=(Ending(),), settings=Settings(step="graph"))
    assert tapes.recorded == PLAN.epochs


def reduced(step: str, masks: str) -> dict[str, Tensor]:
    """All three stages: sensitivity by rewiring, the learner of masks, gated branches with an auxiliary classifier."""
    settings, data = Settings(step=step), replace(DATA, augment="crop")
    teacher, _ = train_teacher(SPEC, PLANS.teacher, Stages(data, settings), base=network())
    options = shallow.Options(300, d_th=0.9, exit=LEARNERS[masks].rest == "identity", masks=masks)
    return shallow.reduce(SPEC, teacher, options, PLANS, Stages(data, settings)).model.state_dict()


@functools.cache
def eagerly_reduced(masks: str) -> dict[str, Tensor]:
    """What the other ways are compared with."""
    return reduced("eager", masks)


def without_a_warning(step: str, masks: str) -> dict[str, Tensor]:
    """`reduced` with steps of that kind indeed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShoalWarning)
        return reduced(step, masks)


@pytest.mark.parametrize("masks", fast_where(lambda masks: masks in ("senet", "snl"), LEARNERS))
def test_every_learner_is_recorded_with_the_same_bits(tapes: Tapes, masks: str) -> None:
    assert same(eagerly_reduced(masks), without_a_warning("graph", masks))
    assert tapes.played > tapes.recorded > 0


def test_rewiring_is_recorded_with_the_same_bits(tapes: Tapes) -> None:
    def densities(step: str) -> dict[str, float]:
        model = network()
        hook = DynamicRewiring(model, PLAN.epochs, 0.3, per_epoch=3)
        fit(model, DATA, OBJECTIVE, PLAN, hooks=(hook,), settings=Settings(step=step))
        return hook.densities()

    assert densities("eager") == densities("graph")


def test_the_tape_tells_what_is_not_recordable(tapes: Tapes) -> None:
    """The stand-in must fail where a CUDA graph would: a number that Python knows is fixed when it is recorded."""

    class Growing:
        recordable = True
        steps = 0

        def __call__(self, student: Outputs, teacher: Outputs | None, labels: Tensor) -> Any:
            self.steps += 1
            loss, _ = OBJECTIVE(student, teacher, labels)
            return self.steps * loss, {}

    def trained(step: str) -> dict[str, Tensor]:
        model = network()
        fit(model, DATA, Growing(), replace(PLAN, epochs=1), settings=Settings(step=step))
        return model.state_dict()

    assert same(trained("eager"), trained("eager"))
    assert not same(trained("eager"), trained("graph"))


def bank() -> tuple[Objective, tuple[Any, ...]]:
    teacher = NeighbourTeacher(Neighbourhood(k=3, bank=64), 4)
    return Objective((cross_entropy(), neighbours(teacher, 0.5))), (teacher,)


class Listening:
    """A hook that says nothing about recording."""

    taps: tuple[str, ...] = ()
    heard = 0

    def on_batch(self, student: Outputs, teacher: Outputs | None) -> None:
        self.heard += 1


@pytest.mark.parametrize(
    ("step", "made", "text"),
    [
        ("graph", bank, "neighbours, which may compute something else.*not recorded"),
        ("compiled", bank, "neighbours, which may compute something else.*not compiled"),
        ("graph", lambda: (OBJECTIVE, (Listening(),)), "Listening, which may compute something else.*not recorded"),
    ],
)
def test_what_remembers_steps_in_python_runs_eagerly_and_says_so(tapes: Tapes, step: str, made: Any, text: str) -> None:
    def trained(step: str) -> dict[str, Tensor]:
        model, (objective, hooks) = network(), made()
        fit(model, DATA, objective, replace(PLAN, epochs=2), hooks=hooks, settings=Settings(step=step))
        return model.state_dict()

    expected = trained("eager")
    with pytest.warns(ShoalWarning, match=text):
        assert same(expected, trained(step))
    assert not tapes.recorded


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("step", ["graph", "compiled-graph"])
def test_a_cpu_has_no_graphs_and_a_warning_says_so(step: str, traced: None) -> None:
    with pytest.warns(ShoalWarning, match="found device 'cpu'; need.*CUDA device; the step is not recorded"):
        found = distilled(step)
    assert close(found[0], eagerly_distilled()[0])


@pytest.mark.parametrize("step", ["graph", "compiled"])
def test_drawn_widths_run_eagerly_and_say_so(tapes: Tapes, step: str) -> None:
    plan = replace(inplace.quick(True), schedule=replace(PLAN, epochs=1))
    options = inplace.Options("ta-m", widths=(0.5, 0.75, 1.0), drawn=2)

    def trained(step: str) -> dict[str, Tensor]:
        return inplace.train(SPEC, options, plan, Stages(DATA, Settings(step=step)), base=network()).model.state_dict()

    with pytest.warns(ShoalWarning, match="Slimmable, which may compute something else at each step"):
        found = trained(step)
    assert same(found, trained("eager"))
    assert not tapes.recorded


@pytest.mark.parametrize(
    "options", [inplace.Options("ta-m", widths=(0.5, 1.0)), inplace.Options("ta-1", exits=("relu",))]
)
def test_exits_and_widths_are_recorded_with_the_same_bits(tapes: Tapes, options: inplace.Options) -> None:
    plan = replace(inplace.quick(True), schedule=replace(PLAN, epochs=2))
    results = [
        inplace.train(SPEC, options, plan, Stages(DATA, Settings(step=step)), base=network()).model.state_dict()
        for step in ("eager", "graph")
    ]
    assert same(*results)
    assert tapes.played > tapes.recorded == 1


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(ShoalError, match="found step 'jit'; need one of eager, compiled, graph, compiled-graph"):
        Settings(step="jit")


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.allclose(a[k].double(), b[k].double(), rtol=1e-3, atol=1e-4) for k in a)


@COMPILES
def test_a_compiled_step_learns_the_same(traced: None) -> None:
    (weights, rows), (again, rows_again) = eagerly_distilled(), distilled("compiled")
    assert close(weights, again)
    assert all(a == pytest.approx(b, rel=1e-3, abs=1e-3) for a, b in zip(rows, rows_again, strict=True))


@COMPILES
@pytest.mark.slow
def test_the_tenth_network_of_a_process_is_compiled_too(traced: None) -> None:
    for _ in range(10):
        before = compilations()
        fit(network(), DATA, OBJECTIVE, replace(PLAN, epochs=1), settings=Settings(step="compiled"))
        assert compilations() > before


@COMPILES
@pytest.mark.slow
@pytest.mark.parametrize("masks", LEARNERS)
def test_every_learner_compiles_and_learns_the_same(traced: None, monkeypatch: pytest.MonkeyPatch, masks: str) -> None:
    """And nothing is compiled while a step is recorded: the compiler asks CUDA's generators, which that forbids."""
    if masks not in ("senet", "autorep"):  # for the others, the pass over the backward pass would only take time
        monkeypatch.setattr(torch, "compile", partial(COMPILE, backend="eager"))
    again, begun = Again(), compilations()
    monkeypatch.setattr("shoal.training.stepping.recorder_for", lambda device: again)
    assert close(eagerly_reduced(masks), without_a_warning("compiled-graph", masks))
    assert compilations() > begun
    assert again.recorded > 0
    assert again.compiled == 0


@pytest.mark.slow
@COMPILES
def test_a_compiled_step_is_recorded(traced: None, tapes: Tapes) -> None:
    """Under this stand-in the compiler leaves the step as it is; see `Again` for one under which it does not."""
    assert close(eagerly_distilled()[0], distilled("compiled-graph")[0])
    assert tapes.played > tapes.recorded > 0


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_compiling_fails_all_steps_run_eagerly(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise RuntimeError("no compiler")

    def fails(judge: Any, **options: Any) -> Any:
        def failing(x: Tensor, y: Tensor) -> Any:
            loss, *rest = judge(x, y)  # by now batch norms have seen the batch
            if where == "forward":
                raise RuntimeError("no compiler")
            return Broken.apply(loss), *rest

        return failing

    expected = eagerly_distilled()
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.warns(ShoalWarning, match="found that the step cannot be compiled .RuntimeError: no compiler"):
        found = distilled("compiled")
    assert same(expected[0], found[0])
    assert expected[1] == found[1]


@COMPILES
@pytest.mark.slow
def test_compiled_kernels_learn_the_same() -> None:
    """With the real compiler; sums in another order part the paths, so it is two epochs that are compared."""
    weights = []
    for step in ("eager", "compiled"):
        model = network()
        fit(model, DATA, OBJECTIVE, replace(PLAN, epochs=2, lr=0.01), settings=Settings(step=step))
        weights.append(model.state_dict())
    assert close(*weights)


def test_taps_do_not_outlive_what_reads_them(tapes: Tapes) -> None:
    student, budget = masked()
    left: list[int] = []

    class Looking:
        taps = tuple(budget.counts)
        recordable = True

        def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
            left.append(sum(len(hook.__closure__[0].cell_contents) for hook in hooks_of(model)))

    teacher = add_masks(network(), full(student))
    fit(student, DATA, OBJECTIVE, replace(PLAN, epochs=2), teacher=teacher, hooks=(Looking(),))
    assert left == [0, 0]
    assert not hooks_of(student)


def hooks_of(model: nn.Module) -> list[Any]:
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]
