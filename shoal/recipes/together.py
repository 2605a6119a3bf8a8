"""Lessons of online distillation: several networks or branches are trained together, and the first is deployed."""

from __future__ import annotations

from torch import nn

from shoal.distillation.mutual import below, cross_entropies, each_other, from_mean, lessons_of, sigmoid_ramp
from shoal.distillation.peers import Peers, fused, gated
from shoal.exits.classifiers import keep_exit
from shoal.recipes.from_teacher import Options
from shoal.recipes.lessons import Lesson, Problem
from shoal.training.objective import Weight

PUBLISHED = 300
"""Epochs of ONE and FFL. The weight of the divergences rises during the first 80 of them."""


def _networks(problem: Problem, count: int) -> list[nn.Module]:
    return [problem.network() for _ in range(count)]


def _first(model: nn.Module) -> nn.Module:
    return keep_exit(model, 0)


def _first_peer(model: nn.Module) -> nn.Module:
    assert isinstance(model, Peers)
    return model.networks[0]


def mutual(problem: Problem, options: Options) -> Lesson:
    """DML: separate networks; each learns from the softmax of all others at temperature 1."""
    count = options.branches
    terms = (*cross_entropies(count), lessons_of(each_other(count)))
    return Lesson(Peers(_networks(problem, count)), terms, exit=0, cut=_first_peer)


def _ramp(problem: Problem) -> Weight:
    """The rising weight: over 80 of the published 300 epochs, and over the same fraction of any other number."""
    return sigmoid_ramp(problem.schedule.epochs * 80 / PUBLISHED)


def gated_branches(problem: Problem, options: Options) -> Lesson:
    """ONE: branches; their gated ensemble teaches each branch at temperature 3."""
    count = options.branches
    terms = (*cross_entropies(count + 1), lessons_of(below(count), 3.0, _ramp(problem)))
    model = gated(_networks(problem, count), problem.spec.shape)
    return Lesson(model, terms, exit=0, cut=_first)


def fused_branches(problem: Problem, options: Options) -> Lesson:
    """FFL: a classifier on fused features teaches the branches; the mean of the branches' logits teaches it."""
    count, ramp = options.branches, _ramp(problem)
    learned = (lessons_of(below(count), 3.0, ramp), from_mean(count, range(count), 3.0, ramp))
    terms = (*cross_entropies(count + 1), *learned)
    model = fused(_networks(problem, count), problem.spec.shape)
    return Lesson(model, terms, exit=0, cut=_first)
