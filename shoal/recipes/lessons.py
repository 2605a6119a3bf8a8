"""Training by distillation, and of the same network by cross-entropy alone for the same number of epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shoal.exits.classifiers import check_one_classifier
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.recipes.stages import Stages, check_teacher, fresh
from shoal.training.loop import History
from shoal.training.objective import Objective, Term, cross_entropy
from shoal.training.schedule import Schedule


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Lesson:
    """The arguments of one `fit`: the module to train, its loss terms, teacher and hooks.

    `cut` takes the trained module and returns the network to deploy. The validation accuracy of classifier `exit`
    chooses the best epoch; with None it is the mean over all classifiers.
    """

    model: nn.Module
    terms: tuple[Term, ...]
    teacher: nn.Module | None = None
    hooks: tuple[Any, ...] = ()
    exit: int | None = -1
    cut: Callable[[nn.Module], nn.Module] = _as_it_is


@dataclass(frozen=True)
class Problem:
    """The network to train, its schedule and stages. `base` is a module in memory; its weights are drawn again."""

    spec: Spec
    schedule: Schedule
    stages: Stages
    base: nn.Module | None = None

    def network(self) -> nn.Module:
        """The network with new random weights from PyTorch's global generator."""
        return assemble(self.spec, None if self.base is None else fresh(self.base))


@dataclass
class Result:
    """The distilled network, the baseline, and `whole`: the module that was trained, with all its classifiers."""

    spec: Spec
    model: nn.Module
    baseline: nn.Module
    whole: nn.Module
    histories: dict[str, History]


Teach = Callable[[Problem], Lesson]
"""Builds a method's lesson. If another network must be trained first, it does that in an additional stage."""


def learn(problem: Problem, teach: Teach) -> Result:
    """Train the problem's network as `teach` says (stage ``distill``) and by cross-entropy alone (``baseline``).

    Both start from the same weights and see the same batches. Raises ShoalError for a network that has been reduced or
    has several classifiers, and StoppedError when the time is up.
    """
    spec, stages, seed = problem.spec, problem.stages, problem.stages.settings.seed
    check_teacher(spec)
    check_one_classifier(problem.network(), spec.base)
    torch.manual_seed(seed)
    lesson = teach(problem)
    stages.fit(
        "distill", lesson.model, Objective(lesson.terms), problem.schedule, teacher=lesson.teacher, hooks=lesson.hooks,
        settings={"exit": lesson.exit},
    )  # fmt: skip
    torch.manual_seed(seed)
    baseline = problem.network()
    stages.fit("baseline", baseline, Objective((cross_entropy(),)), problem.schedule)
    whole = lesson.model.eval()
    return Result(spec, lesson.cut(whole).eval(), baseline.eval(), whole, stages.histories)
