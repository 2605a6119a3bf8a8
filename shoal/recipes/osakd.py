"""*Online Self-Acquired Knowledge Distillation* (Tzelepi and Tefas): soft labels from each sample's neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.data.dataset import Dataset
from shoal.distillation.neighbours import LOSSES, Neighbourhood, NeighbourTeacher, neighbours
from shoal.errors import ShoalError
from shoal.recipes.lessons import Lesson, Problem, Teach
from shoal.training.objective import cross_entropy
from shoal.training.schedule import SCHEDULES, Schedule


@dataclass(frozen=True)
class Preset:
    """A schedule, and lambda (`balance`): the weight of the cross-entropy in eq. 5."""

    schedule: Schedule
    balance: float = 0.9


def quick(epochs: int = 12, batch: int = 64) -> Preset:
    """A short cosine schedule for small data."""
    return Preset(Schedule(epochs, 0.05, kind="cosine", warmup=0.5, batch_size=batch))


def paper() -> Preset:
    """Section IV.B, for the paper's CNNs. The paper states no weight decay, so there is none here."""
    return Preset(SCHEDULES["osakd"])


def paper_tiny_imagenet() -> Preset:
    """Section IV.B, for ResNet-50 on Tiny ImageNet: lambda is 0.99."""
    return Preset(paper().schedule, 0.99)


def paper_resnet() -> Preset:
    """Section IV.C, for ResNet-32; batch size and weight decay are those of the public code of ONE and FFL."""
    return Preset(SCHEDULES["osakd-resnet"])


PRESETS: dict[str, Callable[[], Preset]] = {
    "quick": quick,
    "paper": paper,
    "paper-tiny-imagenet": paper_tiny_imagenet,
    "paper-resnet": paper_resnet,
}


@dataclass(frozen=True)
class Options:
    """How neighbours are searched, the loss towards their labels (one of `LOSSES`), and lambda (None: the preset's)."""

    where: Neighbourhood = field(default_factory=Neighbourhood)
    loss: str = "mse-sum"
    balance: float | None = None


def check_options(options: Options, data: Dataset, schedule: Schedule) -> None:
    """Raise ShoalError, before any training, for an unknown loss, lambda out of range, or k too large for a batch."""
    if options.loss not in LOSSES:
        raise ShoalError(f"found loss {options.loss!r}; need one of {', '.join(LOSSES)}; choose one")
    if options.balance is not None and not 0 <= options.balance < 1:
        raise ShoalError(
            f"found lambda {options.balance}; need 0 <= lambda < 1; at 1 no sample would learn from its neighbours"
        )
    options.where.check(min(schedule.batch_size, len(data.train)))


def teach(options: Options, preset: Preset) -> Teach:
    """The lesson of eq. 5: lambda x cross-entropy + (1 - lambda) x loss towards the soft labels."""
    balance = preset.balance if options.balance is None else options.balance

    def lesson(problem: Problem) -> Lesson:
        check_options(options, problem.stages.data, problem.schedule)
        own = NeighbourTeacher(options.where, problem.spec.classes)
        terms = (cross_entropy(balance), neighbours(own, 1 - balance, options.loss))
        return Lesson(problem.network(), terms, hooks=(own,))

    return lesson
