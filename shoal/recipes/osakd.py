"""*Online Self-Acquired Knowledge Distillation* (Tzelepi and Tefas): a network teaches itself by its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.data.dataset import Dataset
from shoal.distillation.neighbours import LOSSES, Neighbourhood, NeighbourTeacher, neighbours
from shoal.errors import ShoalError
from shoal.recipes.lessons import Lesson, Problem, Teach
from shoal.training.objective import cross_entropy
from shoal.training.schedule import Schedule


@dataclass(frozen=True)
class Preset:
    """A schedule, and the part lambda that the cross-entropy has in eq. 5."""

    schedule: Schedule
    balance: float = 0.9


def quick(epochs: int = 12, batch: int = 64) -> Preset:
    """A short cosine schedule for small data."""
    return Preset(Schedule(epochs, 0.05, kind="cosine", warmup=0.5, batch_size=batch))


def paper() -> Preset:
    """Section IV.B, for the paper's CNNs. It states no weight decay; this has none."""
    return Preset(Schedule(100, 1e-3, batch_size=64, weight_decay=0.0))


def paper_tiny_imagenet() -> Preset:
    """Section IV.B, for ResNet-50 on Tiny ImageNet: lambda is 0.99."""
    return Preset(paper().schedule, 0.99)


def paper_resnet() -> Preset:
    """Section IV.C, for ResNet-32; batch size and weight decay are those of the public code of ONE and FFL."""
    return Preset(Schedule(300, 0.1, (150, 225), batch_size=128, weight_decay=1e-4, nesterov=True))


PRESETS: dict[str, Callable[[], Preset]] = {
    "quick": quick,
    "paper": paper,
    "paper-tiny-imagenet": paper_tiny_imagenet,
    "paper-resnet": paper_resnet,
}


@dataclass(frozen=True)
class Options:
    """Where neighbours are looked for, the loss towards their labels (of `LOSSES`), and lambda if not the preset's."""

    where: Neighbourhood = field(default_factory=Neighbourhood)
    loss: str = "mse-sum"
    balance: float | None = None


def check_options(options: Options, data: Dataset, schedule: Schedule) -> None:
    """Raise ShoalError, before any training, for an unknown loss, a lambda out of range, and a k above the batch's."""
    if options.loss not in LOSSES:
        raise ShoalError(f"found loss {options.loss!r}; need one of {', '.join(LOSSES)}; choose one")
    if options.balance is not None and not 0 <= options.balance < 1:
        raise ShoalError(
            f"found lambda {options.balance}; need 0 <= lambda < 1; at 1 no sample would learn from its neighbours"
        )
    options.where.check(min(schedule.batch_size, len(data.train)))


def teach(options: Options, preset: Preset) -> Teach:
    """The lesson of eq. 5: lambda times the cross-entropy, and the rest of 1 times the loss towards soft labels."""
    balance = preset.balance if options.balance is None else options.balance

    def lesson(problem: Problem) -> Lesson:
        check_options(options, problem.stages.data, problem.schedule)
        own = NeighbourTeacher(options.where, problem.spec.classes)
        terms = (cross_entropy(balance), neighbours(own, 1 - balance, options.loss))
        return Lesson(problem.network(), terms, hooks=(own,))

    return lesson
