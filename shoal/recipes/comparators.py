"""Methods that OSAKD and self-distillation are compared with, offline and online, in one table.

Constants are those of RepDistiller and mdistiller (KD to RKD), of the overhaul's, ONE's and FFL's authors, and of DML's
paper; docs/papers/osakd.md lists them with what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from shoal.distillation.peers import check_count
from shoal.errors import ShoalError
from shoal.exits.classifiers import check_one_classifier
from shoal.networks.spec import Spec
from shoal.recipes import from_teacher as offline
from shoal.recipes import together as online
from shoal.recipes.from_teacher import Options
from shoal.recipes.lessons import Lesson, Problem, Teach
from shoal.surgery.tracing import trace
from shoal.training.schedule import Schedule

REPDISTILLER = Schedule(240, 0.05, (150, 180, 210), batch_size=64)
OVERHAUL = Schedule(200, 0.1, (100, 150))
DML = Schedule(200, 0.1, (60, 120, 180), batch_size=64, nesterov=True)
ONLINE = Schedule(online.PUBLISHED, 0.1, (150, 225), batch_size=128, weight_decay=1e-4, nesterov=True)


@dataclass(frozen=True)
class Method:
    """How a method teaches, its published schedule, and what it needs: a teacher, an assistant, or branches."""

    summary: str
    lesson: Callable[[Problem, Options], Lesson]
    schedule: Schedule
    teacher: bool = False
    assistant: bool = False
    branches: int = 0
    """Networks or branches that teach each other unless told otherwise; 0 for an offline method."""


_offline = partial(Method, schedule=REPDISTILLER, teacher=True)

METHODS: dict[str, Method] = {
    "kd": _offline("softened logits of a teacher (Hinton et al.)", offline.hinton),
    "fitnet": _offline("a hint layer through a regressor (FitNets)", offline.hint_layer),
    "at": _offline("attention maps of every stage (attention transfer)", offline.attention_maps),
    "spkd": _offline("similarities between samples (SPKD)", offline.similarities),
    "rkd": _offline("distances and angles between embeddings (RKD)", offline.relational),
    "overhaul": Method(
        "maps before the ReLUs, with margins (overhaul)", offline.before_relu, OVERHAUL, teacher=True
    ),
    "takd": _offline("a teacher assistant between teacher and student (TAKD)", offline.assistant, assistant=True),
    "dml": Method("networks side by side (deep mutual learning)", online.mutual, DML, branches=2),
    "one": Method("branches and their gated ensemble (ONE)", online.gated_branches, ONLINE, branches=3),
    "ffl": Method("branches and their fused features (FFL-S)", online.fused_branches, ONLINE, branches=2),
}  # fmt: skip


def method(name: str) -> Method:
    """The method by its name. Raises ShoalError for an unknown one."""
    if name not in METHODS:
        raise ShoalError(f"found method {name!r}; need one of {', '.join(METHODS)}; choose one")
    return METHODS[name]


def teach(name: str, options: Options) -> Teach:
    """The method's lesson with these options. Raises ShoalError as `method` and `check_options` do."""
    found = method(name)

    def lesson(problem: Problem) -> Lesson:
        check_options(name, options, problem.spec)
        branches = options.branches or found.branches
        return found.lesson(problem, replace(options, branches=branches))

    return lesson


def check_options(name: str, options: Options, spec: Spec) -> None:
    """Raise ShoalError for options that the method lacks or that it has no use for, and for an unfit teacher."""
    found = method(name)
    for what in ("teacher", "assistant"):
        has, needs = getattr(options, what) is not None, getattr(found, what)
        if has != needs:
            raise ShoalError(
                f"found {'one' if has else 'no'} {what} for method {name!r}; need {'one' if needs else 'none'}; "
                f"{'give' if needs else 'leave out'} --{what} (Options.{what})"
            )
    if options.branches and not found.branches:
        raise ShoalError(f"found {options.branches} branches for method {name!r}; need none; leave them out")
    if found.branches:
        check_count(options.branches or found.branches)
    _check_fit(options, spec)


def _check_fit(options: Options, spec: Spec) -> None:
    other = options.assistant
    if other is not None and (other.classes, other.shape) != (spec.classes, spec.shape):
        raise ShoalError(
            f"found an assistant for {other.classes} classes of {other.shape}; need {spec.classes} of {spec.shape}"
        )
    if options.teacher is None:
        return
    check_one_classifier(options.teacher, "the teacher")
    graph = trace(options.teacher, spec.shape)
    if [graph[name].shape for name in graph.outputs] != [(spec.classes,)]:
        raise ShoalError(
            f"found a teacher without logits for {spec.classes} classes; need one; train it on the same data"
        )
