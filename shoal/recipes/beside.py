"""Self-distillation together with another teacher: a trained one (KD, AT), or a second such network (DML)."""

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
    "at": "its attention maps",
    "dml": "a second network that learns alike",
}
"""What else teaches the final classifier, or the stages, of a network that teaches its shallow ones."""

Make = Callable[[], tuple[nn.Module, tuple[Term, ...]]]
"""A network with shallow classifiers, of new weights, and the terms by which it teaches them."""


def check(by: str | None, teacher: nn.Module | None) -> None:
    """Raise ShoalError for an unknown way, and for one without its teacher or with a teacher that has no use."""
    if by is not None and by not in BESIDE:
        raise ShoalError(f"found teacher beside {by!r}; need one of {', '.join(BESIDE)}; choose one")
    if (by in ("kd", "at")) != (teacher is not None):
        found, wanted = ("no teacher", "a trained one") if teacher is None else ("a teacher", "kd or at, which use it")
        raise ShoalError(f"found {found} and {by or 'no way to learn from it'}; need {wanted}; give both, or neither")


def lesson(by: str | None, make: Make, plain: nn.Module, teacher: nn.Module | None, shape: tuple[int, ...]) -> Lesson:
    """What `make` gives, taught by `by` as well; constants are those of `shoal distill`.

    `plain` is the network without its shallow classifiers, whose stages end where the student's do. Raises ShoalError
    (AT) for a teacher with another number of stages.
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
    """Two networks, each taught by its own terms and, its final classifier, by the other's."""
    other, others = make()
    count = count_exits(model)
    both = [_of(term, i * count, count, f"networks.{i}.") for i, own in enumerate((terms, others)) for term in own]
    ends = lessons_of({count - 1: {2 * count - 1: 1.0}, 2 * count - 1: {count - 1: 1.0}})
    return Lesson(Peers([model, other]), (*both, ends), exit=count - 1, cut=_first)


def _first(model: nn.Module) -> nn.Module:
    assert isinstance(model, Peers)
    return drop_unread(model.networks[0])


def _of(term: Term, first: int, count: int, prefix: str) -> Term:
    """The same term for one network among peers: its classifiers from `first` on, its taps behind `prefix`."""

    def loss(student: Outputs, teacher: Outputs | None, labels: Tensor) -> Tensor:
        taps = {name.removeprefix(prefix): value for name, value in student.taps.items() if name.startswith(prefix)}
        return term.loss(Outputs(student.logits[first : first + count], taps), teacher, labels)

    own = tuple(prefix + tap for tap in (*term.taps, *term.own))
    return replace(term, name=f"{prefix}{term.name}", loss=loss, taps=(), own=own)
