"""Nothing in a step makes the host wait for its device, nor does it between most steps."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from shoal.data.augment import POLICIES
from shoal.distillation.losses import kd, pram
from shoal.networks.spec import Spec
from shoal.recipes import shallow
from shoal.recipes.stages import Stages, train_teacher
from shoal.reduction.learners import LEARNERS
from shoal.reduction.learners.senet import DifferenceLearner
from shoal.reduction.masks import add_masks
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.support.fits import DATA, PLAN, SHAPE, full, masked, network
from tests.support.tables import fast_where
from tests.support.tapes import Waits

SPEC = Spec("given", 4, SHAPE)
EPOCHS = Schedule(3, 0.05, (2,), batch_size=32)
PLANS = replace(
    shallow.quick(), teacher=EPOCHS, sensitivity=replace(EPOCHS, epochs=2), mask=EPOCHS, finetune=EPOCHS, rewirings=4
)


class Watching:
    """A hook that watches for operators that wait, between the end of an epoch's first step and the end of its last."""

    taps: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.waits, self.steps = Waits(), 0

    def on_epoch_start(self, model: nn.Module, epoch: int) -> None:
        self.steps = 0

    def on_stepped(self, model: nn.Module) -> None:
        self.steps += 1
        if self.steps == 1:
            self.waits.__enter__()
        if self.steps == len(DATA.train) // PLAN.batch_size:
            self.waits.__exit__(None, None, None)


@pytest.mark.parametrize("policy", fast_where(lambda policy: policy == "crop-flip-cutout", POLICIES))
def test_nothing_in_a_step_waits_for_the_device(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["shoal.data.augmentation.autoaugment"]  # the package's attribute is the function in it
    monkeypatch.setattr(module, "_chosen", module._all)  # type: ignore[attr-defined]
    watching = Watching()
    student, budget = masked()
    teacher = add_masks(network(), full(student))
    objective = Objective((cross_entropy(0.5), kd(0.5), pram(1.0, list(budget.counts))))
    hooks: tuple[Any, ...] = (DifferenceLearner(budget), watching)
    fit(student, replace(DATA, augment=policy), objective, replace(PLAN, epochs=2), teacher=teacher, hooks=hooks)
    assert watching.steps == len(DATA.train) // PLAN.batch_size
    assert not watching.waits.found


RARELY = 256
"""Looks that a learner may take at its numbers in a whole search, or prunings."""


@pytest.mark.slow
@pytest.mark.parametrize("masks", LEARNERS)
def test_hardly_any_step_of_a_search_waits(masks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a step a learner may look at its numbers now and then, and not each time at each site."""
    method, waiting = LEARNERS[masks], list[bool]()
    before = getattr(method, "on_step", None)
    if before is None:
        return

    def watched(self: Any, model: nn.Module, epoch: float) -> Any:
        with (waits := Waits()):
            changed = before(self, model, epoch)
        waiting.append(bool(waits.found))
        return changed

    monkeypatch.setattr(method, "on_step", watched)
    long = replace(PLANS, mask=replace(EPOCHS, epochs=72))
    data = replace(DATA, train=DATA.train.take(torch.arange(128)))
    teacher, _ = train_teacher(SPEC, PLANS.teacher, Stages(data, Settings()), base=network())
    shallow.reduce(
        SPEC, teacher, shallow.Options(300, gates=False, exit=False, masks=masks), long, Stages(data, Settings())
    )
    assert len(waiting) == 288 > RARELY
    assert sum(waiting) <= RARELY


def test_the_watch_finds_what_waits() -> None:
    with (waits := Waits()):
        values = torch.arange(4.0)
        assert not waits.found
        float(values.sum())
        values[values > 1]
        torch.tensor(3.0)
        torch.where(values > 1, values, 0)
        values[torch.arange(2)]
    assert waits.found == ["aten::_local_scalar_dense", "aten::index", "aten::lift_fresh"]
