"""What the runs of a grid train: networks, epochs, numbers of images, and networks that teach.

Sites without ReLUs, masks and gated branches are left out, because they hardly change the time of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.jobs.distill import OSAKD
from shoal.jobs.inputs import longer
from shoal.jobs.prune import Request
from shoal.jobs.train import teacher_presets
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.recipes import comparators, deepreduce, inplace, osakd, self_distill, shallow
from shoal.recipes.deepreduce.designs import RESHAPES, Design, parse
from shoal.recipes.deepreduce.space import DesignSpace
from shoal.sweep.grid import Planned
from shoal.training.schedule import Schedule, parse_schedule

CLOUD = (3, 1024, 1)
DATA: dict[str, tuple[int, tuple[int, ...], int, int]] = {
    "cifar10": (10, (3, 32, 32), 50_000, 10_000),
    "cifar100": (100, (3, 32, 32), 50_000, 10_000),
    "svhn": (10, (3, 32, 32), 73_257, 26_032),
    "fashion-mnist": (10, (1, 32, 32), 60_000, 10_000),
    "tiny-imagenet": (200, (3, 64, 64), 100_000, 10_000),
    "ILSVRC": (1000, (3, 224, 224), 1_281_167, 50_000),
    "modelnet10": (10, CLOUD, 3_991, 908),
    "modelnet40": (40, CLOUD, 9_843, 2_468),
}
"""Data set -> classes, shape of an image, number of images for training and validation, number of test images."""
VALIDATION = 0.1
"""Fraction of the training images that is held out."""


@dataclass(frozen=True)
class Training:
    """One training: network, data, schedule, teacher, number of equal networks, and whether each epoch is tested."""

    spec: Spec
    data: str
    schedule: Schedule
    teacher: Spec | None = None
    copies: int = 1
    tests: bool = False


@dataclass(frozen=True)
class Given:
    """The words of a run's command line, and the spec and data of earlier runs by folder."""

    words: tuple[str, ...]
    earlier: Mapping[str, tuple[Spec, str]]

    def option(self, name: str, otherwise: str = "") -> str:
        """The value of an option, or `otherwise` if it is not given."""
        return self.words[self.words.index(name) + 1] if name in self.words else otherwise

    @property
    def epochs(self) -> int | None:
        """The value of --epochs."""
        return int(self.option("--epochs")) if "--epochs" in self.words else None

    def scheduled(self, own: Callable[[], Schedule]) -> Schedule:
        """The schedule of --schedule, or else `own`, the preset's; of --epochs epochs if they are given."""
        text = self.option("--schedule")
        return longer(parse_schedule(text) if text else own(), self.epochs)

    @property
    def source(self) -> tuple[Spec, str]:
        """Spec and data of the run that is the command's argument."""
        return self.earlier[self.words[-1]]

    @property
    def teacher(self) -> Spec | None:
        """The spec of the run that teaches."""
        return self.earlier[self.option("--teacher")][0] if "--teacher" in self.words else None

    def network(self) -> tuple[Spec, str]:
        """Spec and data of the network that the argument names; with a teacher's run, its data."""
        data = self.option("--data") or self.earlier[self.option("--teacher")][1]
        classes, shape, *_ = DATA[data]
        return Spec(self.words[-1], classes, shape), data


def train(given: Given) -> list[Training]:
    """The trainings of `shoal train`; the first one is that of the run's network, as in the functions below."""
    spec, data = given.network()
    schedule = given.scheduled(lambda: teacher_presets()[given.option("--preset")].teacher)
    return [Training(spec, data, schedule)]


def reduce(given: Given) -> list[Training]:
    """The trainings of `shoal reduce`. Every mask search counts as a student and its teacher for as many epochs."""
    spec, data = given.source
    if given.option("--recipe") == "deepreduce":
        return _designs(given, spec, data)
    preset = shallow.PRESETS[given.option("--preset")]()
    tuned = Training(spec, data, preset.finetune, spec)
    searched = [Training(spec, data, preset.sensitivity), Training(spec, data, preset.mask, spec)]
    return [tuned] if "--masks-from" in given.words else [tuned, *searched]


def _designs(given: Given, spec: Spec, data: str) -> list[Training]:
    preset, names = deepreduce.PRESETS[given.option("--preset")](), given.option("--designs")
    space = DesignSpace(spec, assemble(spec))
    tutor = given.earlier[given.option("--taught-by")][0] if "--taught-by" in given.words else spec
    teacher = None if "--no-kd" in given.words else tutor
    chosen = [parse(name.strip(), space.stages) for name in names.split(",")] if names else _grid(space.stages)
    trained = [replace(space.plan(design).spec, dropped=()) for design in chosen]
    alone = [] if names else [Training(spec, data, preset.criticality, tutor)] * len(space.stages)
    return [Training(spec, data, preset.design), *(Training(s, data, preset.design, teacher) for s in trained), *alone]


def _grid(stages: list[int]) -> list[Design]:
    """As many designs of each shape as the whole grid has; which stages lose their ReLUs does not matter here."""
    shapes = [Design(), Design(), *(Design(width=width, resolution=size) for width, size in RESHAPES)]
    return shapes * (len(stages) - 1)


def self_distilled(given: Given) -> list[Training]:
    """The trainings of `shoal self-distill`."""
    spec, data = given.network()
    number = {name: float(given.option(f"--{name}")) for name in ("alpha",) if f"--{name}" in given.words}
    weight = given.option("--feature-weight")
    options = self_distill.Options(
        scheme=given.option("--scheme", self_distill.AUTO),
        count=int(given.option("--count")) if "--count" in given.words else None,
        kind=given.option("--kind", self_distill.AUTO),
        path=given.option("--path") or None,
        feature_weight=float(weight) if weight else None,
        beside=given.option("--beside") or None,
        **number,
    ).settled(spec.shape)
    preset = self_distill.PRESETS[given.option("--preset")]()
    teacher = given.teacher
    network = None if teacher is None else assemble(teacher)
    grown = self_distill.check_options(options, options.applied(preset), spec, None, network)
    schedule = given.scheduled(lambda: preset.schedule)
    taught = Training(grown, data, schedule, teacher, copies=2 if options.beside == "dml" else 1)
    return [taught] if "--no-baseline" in given.words else [taught, Training(spec, data, schedule)]


def flexible(given: Given) -> list[Training]:
    """The training of `shoal inplace`."""
    spec, data = given.network()
    widths = tuple(float(width) for width in given.option("--widths").split(",") if width)
    preset = inplace.PRESETS[given.option("--preset")](bool(widths))
    options = inplace.Options(given.option("--method"), widths)
    schedule = given.scheduled(lambda: preset.schedule)
    return [Training(options.spec(spec), data, schedule, tests="--test-every-epoch" in given.words)]


def distilled(given: Given) -> list[Training]:
    """The trainings of `shoal distill`. Branches that share their first layers count as whole networks."""
    (spec, data), method, preset = given.network(), given.words[-2], given.option("--preset")
    if method == OSAKD:
        schedule, copies = given.scheduled(lambda: osakd.PRESETS[preset]().schedule), 1
    else:
        found = comparators.METHODS[method]
        schedule, copies = (
            given.scheduled(lambda: found.schedule),
            int(given.option("--branches", "0")) or found.branches or 1,
        )
    tests = "--test-every-epoch" in given.words
    taught = Training(spec, data, schedule, given.teacher, copies, tests)
    return [taught, Training(spec, data, schedule, tests=tests)]


def pruned(given: Given) -> list[Training]:
    """The trainings of `shoal prune`: one for each amount."""
    spec, data = given.source
    return [Training(spec, data, Request(Path()).schedule)] * len(given.option("--amount").split(","))


COMMANDS: dict[str, Callable[[Given], list[Training]]] = {
    "train": train,
    "reduce": reduce,
    "self-distill": self_distilled,
    "inplace": flexible,
    "distill": distilled,
    "prune": pruned,
}


def trainings(runs: tuple[Planned, ...]) -> dict[str, list[Training]]:
    """The trainings of every run of a grid by its name."""
    earlier: dict[str, tuple[Spec, str]] = {}
    found: dict[str, list[Training]] = {}
    for run in runs:
        mine = COMMANDS[run.words[0]](Given(run.words, earlier))
        earlier[str(run.folder)] = mine[0].spec, mine[0].data
        found[run.name] = mine
    return found
