"""The methods that OSAKD and self-distillation are compared with, offline and online, in one table.

Schedules and loss weights come from RepDistiller and mdistiller (KD to RKD), from the public code of the overhaul, ONE
and FFL, and from the DML paper; docs/papers/osakd.md lists them and the differences.
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
    """A method: how to build its lesson, its published schedule, and whether it needs a teacher or an assistant."""

    summary: str
    lesson: Callable[[Problem, Options], Lesson]
    schedule: Schedule
    teacher: bool = False
    assistant: bool = False
    branches: int = 0
    """Default number of networks or branches that teach each other; 0 for an offline method."""


_offline = partial(Method, schedule=REPDISTILLER, teacher=True)

METHODS: dict[str, Method] = {
    "kd": _offline("a teacher's softened logits (Hinton et al.)", offline.hinton),
    "fitnet": _offline("a teacher's features in a middle layer, through a regressor (FitNets)", offline.hint_layer),
    "at": _offline("a teacher's attention maps at every stage (attention transfer)", offline.attention_maps),
    "spkd": _offline("similarities between samples in a teacher's maps (SPKD)", offline.similarities),
    "rkd": _offline("distances and angles between a teacher's embeddings (RKD)", offline.relational),
    "overhaul": Method(
        "a teacher's maps before the ReLUs, with margins (overhaul)", offline.before_relu, OVERHAUL, teacher=True
    ),
    "takd": _offline("an assistant that a teacher has trained (TAKD)", offline.assistant, assistant=True),
    "dml": Method("other networks, trained at the same time (deep mutual learning)", online.mutual, DML, branches=2),
    "one": Method("the gated ensemble of several branches (ONE)", online.gated_branches, ONLINE, branches=3),
    "ffl": Method("fused features of branches (feature fusion, FFL-S)", online.fused_branches, ONLINE, branches=2),
}  # fmt: skip


def method(name: str) -> Method:
    """The method of this name. Raises ShoalError for an unknown name."""
    if name not in METHODS:
        raise ShoalError(f"found method {name!r}; need one of {', '.join(METHODS)}; choose one")
    return METHODS[name]


def teach(name: str, options: Options) -> Teach:
    """A function that builds the lesson of the method `name` with these options.

    Raises ShoalError for an unknown name; the function raises ShoalError as `check_options` does.
    """
    found = method(name)

    def lesson(problem: Problem) -> Lesson:
        check_options(name, options, problem.spec)
        branches = options.branches or found.branches
        return found.lesson(problem, replace(options, branches=branches))

    return lesson


def check_options(name: str, options: Options, spec: Spec) -> None:
    """Raise ShoalError for missing or unused options, and for a teacher or assistant for other data."""
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
