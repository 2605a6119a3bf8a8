"""Self-distillation with an additional teacher: a trained network (KD, AT), or a second network with exits (DML)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from shoal.distillation.hints import attention
from shoal.distillation.losses import kd
from shoal.distillation.mutual import lessons_of
from shoal.distillation.peers import Peers
from shoal.errors import ShoalError
from shoal.exits.classifiers import count_exits
from shoal.outputs import Outputs
from shoal.recipes.from_teacher import as_it_is, hint_taps, hinted, matched_ends
from shoal.recipes.lessons import Lesson
from shoal.surgery.normal_form import drop_unread
from shoal.surgery.traced import Traced
from shoal.training.objective import Term

BESIDE = {
    "kd": "softened logits of a trained network",
    "at": "attention maps of a trained network",
    "dml": "a second network with shallow classifiers, trained at the same time",
}
"""The additional teachers by name. `kd` and `dml` teach the final classifier, `at` teaches the ends of the stages."""

Make = Callable[[], tuple[nn.Module, tuple[Term, ...]]]
"""Makes a network with shallow classifiers and new weights, and the loss terms of its self-distillation."""


def check(by: str | None, teacher: nn.Module | None) -> None:
    """Raise ShoalError for an unknown name, for kd or at without a teacher, and for a teacher that is not used."""
    if by is not None and by not in BESIDE:
        raise ShoalError(f"found teacher beside {by!r}; need one of {', '.join(BESIDE)}; choose one")
    if (by in ("kd", "at")) != (teacher is not None):
        found, wanted = ("no teacher", "a trained one") if teacher is None else ("a teacher", "kd or at, which use it")
        raise ShoalError(f"found {found} and {by or 'no way to learn from it'}; need {wanted}; give both, or neither")


def lesson(by: str | None, make: Make, plain: nn.Module, teacher: nn.Module | None, shape: tuple[int, ...]) -> Lesson:
    """The lesson of the network and terms that `make` returns, with the additional teacher `by` (None: no other).

    Loss weights and temperatures are those of `shoal distill`. `shape` is the shape [C, H, W] of an image. `plain` is
    the student without its shallow classifiers; it tells where the student's stages end. Raises ShoalError when `by` is
    "at" and the teacher has another number of stages.
    """
    model, terms = make()
    if by == "kd":
        return Lesson(model, (*terms, kd(0.9, 4.0)), teacher, cut=drop_unread)
    if by == "at":
        assert teacher is not None
        ends = [(as_it_is(a), as_it_is(b)) for a, b in matched_ends(Traced(plain, shape), Traced(teacher, shape))]
        return hinted(model, teacher, shape, ends, (*terms, attention(hint_taps(len(ends)))))
    if by == "dml":
        return _mutual(model, terms, make)
    return Lesson(model, terms, cut=drop_unread)


def _mutual(model: nn.Module, terms: tuple[Term, ...], make: Make) -> Lesson:
    """Two networks: each learns by its own terms, and its final classifier also from the other's final classifier."""
    other, others = make()
    count = count_exits(model)
    both = [_of(term, i * count, count, f"networks.{i}.") for i, own in enumerate((terms, others)) for term in own]
    ends = lessons_of({count - 1: {2 * count - 1: 1.0}, 2 * count - 1: {count - 1: 1.0}})
    return Lesson(Peers([model, other]), (*both, ends), exit=count - 1, cut=_first)


def _first(model: nn.Module) -> nn.Module:
    assert isinstance(model, Peers)
    return drop_unread(model.networks[0])


def _of(term: Term, first: int, count: int, prefix: str) -> Term:
    """`term` for one of several peer networks: `count` classifiers from number `first`, tap names after `prefix`."""

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        taps = {name.removeprefix(prefix): value for name, value in student.taps.items() if name.startswith(prefix)}
        return term.loss(Outputs(student.logits[first : first + count], taps), teacher, labels)

    own = tuple(prefix + tap for tap in (*term.taps, *term.own))
    return replace(term, name=f"{prefix}{term.name}", loss=loss, taps=(), own=own)
