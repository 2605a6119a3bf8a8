"""Lessons of online distillation: networks or branches that are trained together, of which the first is deployed."""

from __future__ import annotations

from torch import nn

from shoal.distillation.mutual import below, cross_entropies, each_other, from_mean, lessons_of, sigmoid_ramp
from shoal.distillation.peers import Peers, fused, gated
from shoal.exits.classifiers import keep_exit
from shoal.recipes.from_teacher import Options
from shoal.recipes.lessons import Lesson, Problem
from shoal.training.objective import Weight

PUBLISHED = 300
"""Epochs of ONE and FFL, in the first 80 of which the divergences' weight rises."""


def _networks(problem: Problem, count: int) -> list[nn.Module]:
    return [problem.network() for _ in range(count)]


def _first(model: nn.Module) -> nn.Module:
    return keep_exit(model, 0)


def _first_peer(model: nn.Module) -> nn.Module:
    assert isinstance(model, Peers)
    return model.networks[0]


def mutual(problem: Problem, options: Options) -> Lesson:
    """Networks side by side, each taught by the others' softmax at temperature 1 (DML)."""
    count = options.branches
    terms = (*cross_entropies(count), lessons_of(each_other(count)))
    return Lesson(Peers(_networks(problem, count)), terms, exit=0, cut=_first_peer)


def _ramp(problem: Problem) -> Weight:
    """80 of the published 300 epochs, and the same part of any other number."""
    return sigmoid_ramp(problem.schedule.epochs * 80 / PUBLISHED)


def gated_branches(problem: Problem, options: Options) -> Lesson:
    """Branches and their gated ensemble, which teaches them at temperature 3 (ONE)."""
    count = options.branches
    terms = (*cross_entropies(count + 1), lessons_of(below(count), 3.0, _ramp(problem)))
    model = gated(_networks(problem, count), problem.spec.shape)
    return Lesson(model, terms, exit=0, cut=_first)


def fused_branches(problem: Problem, options: Options) -> Lesson:
    """Branches, taught by the classifier of their fused features, which the mean of their logits teaches (FFL)."""
    count, ramp = options.branches, _ramp(problem)
    learned = (lessons_of(below(count), 3.0, ramp), from_mean(count, range(count), 3.0, ramp))
    terms = (*cross_entropies(count + 1), *learned)
    model = fused(_networks(problem, count), problem.spec.shape)
    return Lesson(model, terms, exit=0, cut=_first)
