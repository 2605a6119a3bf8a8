"""Lessons of offline distillation: from a trained teacher's logits, feature maps or embeddings, or by an assistant.

Loss weights and layers are those on which RepDistiller and mdistiller agree; for the overhaul, those of its authors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from shoal.distillation.adapters import (
    Feature,
    MarginReLU,
    attach,
    connector,
    embedding,
    feature_shape,
    margins,
    regressor,
    stage_ends,
)
from shoal.distillation.hints import attention, fitnet, overhaul, relations, similarity
from shoal.distillation.losses import kd
from shoal.errors import ShoalError
from shoal.networks.spec import Spec
from shoal.recipes.lessons import Lesson, Problem
from shoal.surgery.normal_form import drop_unread
from shoal.surgery.traced import Traced
from shoal.training.objective import Objective, Term, cross_entropy


@dataclass(frozen=True)
class Options:
    """A trained teacher (offline methods), the assistant's spec (TAKD), and the number of branches (online methods).

    With `branches` 0, a method uses the number that its authors use.
    """

    teacher: nn.Module | None = None
    assistant: Spec | None = None
    branches: int = 0


def _teacher(options: Options) -> nn.Module:
    if options.teacher is None:
        raise ShoalError("found no teacher; need a trained one for this method; give --teacher (Options.teacher)")
    return options.teacher


def _traced(problem: Problem, student: nn.Module, teacher: nn.Module) -> tuple[Traced, Traced]:
    return Traced(student, problem.spec.shape), Traced(teacher, problem.spec.shape)


def logits_of(network: nn.Module, teacher: nn.Module) -> Lesson:
    """Cross-entropy (weight 0.1) and the divergence from the teacher's softened logits (weight 0.9, temperature 4)."""
    return Lesson(network, (cross_entropy(0.1), kd(0.9, 4.0)), teacher)


def hinton(problem: Problem, options: Options) -> Lesson:
    """Distillation from the teacher's logits at temperature 4 with weight 0.9 (Hinton et al.)."""
    return logits_of(problem.network(), _teacher(options))


def assistant(problem: Problem, options: Options) -> Lesson:
    """TAKD: train the assistant with the teacher (stage ``assistant``); it then teaches the student.

    The student's weights are drawn first, so that it starts from the same weights as the baseline.
    """
    student, teacher = problem.network(), _teacher(options)
    assert options.assistant is not None
    own = replace(problem, spec=options.assistant, base=None)
    lesson = logits_of(own.network(), teacher)
    problem.stages.fit("assistant", lesson.model, Objective(lesson.terms), problem.schedule, teacher=teacher)
    return logits_of(student, lesson.model)


Adapter = tuple[Feature, nn.Module]
Pair = tuple[Adapter, Adapter]
"""The student's and the teacher's adapter whose outputs one loss compares."""


def hinted(
    student: nn.Module, teacher: nn.Module, shape: tuple[int, ...], pairs: Sequence[Pair], terms: tuple[Term, ...]
) -> Lesson:
    """A lesson whose `terms` compare the outputs of pairs of adapters; `hint_taps` gives the outputs' names.

    `shape` is the shape [C, H, W] of an image.
    """
    mine, theirs = ({f"{i}": pair[side] for i, pair in enumerate(pairs)} for side in (0, 1))
    return Lesson(attach(student, shape, mine), terms, attach(teacher, shape, theirs), cut=drop_unread)


def _with_hints(problem: Problem, student: nn.Module, teacher: nn.Module, pairs: Sequence[Pair], term: Term) -> Lesson:
    """Cross-entropy and one feature loss."""
    return hinted(student, teacher, problem.spec.shape, pairs, (cross_entropy(), term))


def as_it_is(site: str) -> Adapter:
    """The output of `site`, unchanged."""
    return Feature(site), nn.Identity()


def hint_taps(count: int) -> tuple[str, ...]:
    """The tap names of `count` pairs of adapters: ``hints.0``, ``hints.1``, ..."""
    return tuple(f"hints.{i}" for i in range(count))


def matched_ends(student: Traced, teacher: Traced) -> list[tuple[str, str]]:
    """For each stage, the last site of student and teacher. Raises ShoalError if the numbers of stages differ."""
    mine, theirs = (stage_ends(traced) for traced in (student, teacher))
    if len(mine) != len(theirs):
        raise ShoalError(
            f"found {len(mine)} stages in the student and {len(theirs)} in the teacher; need the same number; take "
            "networks of one family, or a method that compares logits or embeddings (kd, takd, spkd, rkd)"
        )
    return list(zip(mine, theirs, strict=True))


def hint_layer(problem: Problem, options: Options) -> Lesson:
    """FitNets: the hint is the output of the second stage, or of the only one."""
    student, teacher = problem.network(), _teacher(options)
    traced = _traced(problem, student, teacher)
    ends = matched_ends(*traced)[:2][-1]
    sizes = [feature_shape(side, Feature(end))[0] for side, end in zip(traced, ends, strict=True)]
    mine, theirs = ends
    pair = ((Feature(mine), regressor(*sizes)), as_it_is(theirs))
    return _with_hints(problem, student, teacher, [pair], fitnet("hints.0"))


def attention_maps(problem: Problem, options: Options) -> Lesson:
    """Attention transfer: attention maps at the end of every stage."""
    student, teacher = problem.network(), _teacher(options)
    ends = matched_ends(*_traced(problem, student, teacher))
    pairs = [(as_it_is(a), as_it_is(b)) for a, b in ends]
    return _with_hints(problem, student, teacher, pairs, attention(hint_taps(len(pairs))))


def similarities(problem: Problem, options: Options) -> Lesson:
    """SPKD: similarities between samples in the last feature map."""
    student, teacher = problem.network(), _teacher(options)
    mine, theirs = (as_it_is(stage_ends(side)[-1]) for side in _traced(problem, student, teacher))
    return _with_hints(problem, student, teacher, [(mine, theirs)], similarity("hints.0"))


def relational(problem: Problem, options: Options) -> Lesson:
    """RKD: distances and angles between samples, in the features that the classifier reads."""
    student, teacher = problem.network(), _teacher(options)
    read = [embedding(side) for side in _traced(problem, student, teacher)]
    pair = ((read[0], nn.Identity()), (read[1], nn.Identity()))
    return _with_hints(problem, student, teacher, [pair], relations("hints.0"))


def before_relu(problem: Problem, options: Options) -> Lesson:
    """Feature overhaul: the input of the last ReLU of every stage, through connectors and margins."""
    student, teacher = problem.network(), _teacher(options)
    traced, pairs = _traced(problem, student, teacher), []
    for a, b in matched_ends(*traced):
        mine, theirs = Feature(a, before=True), Feature(b, before=True)
        sizes = [feature_shape(side, feature)[0] for side, feature in zip(traced, (mine, theirs), strict=True)]
        pairs.append(((mine, connector(*sizes)), (theirs, MarginReLU(margins(traced[1], b)))))
    return _with_hints(problem, student, teacher, pairs, overhaul(hint_taps(len(pairs))))
