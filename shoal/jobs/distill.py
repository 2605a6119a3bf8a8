"""The job of `shoal distill`: train a network by one method of distillation, and its baseline."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from torch import nn

from shoal.data.dataset import Dataset
from shoal.distillation.neighbours import LOSSES, SPACES, Neighbourhood
from shoal.errors import ShoalError
from shoal.exits.classifiers import check_one_classifier
from shoal.jobs.inputs import preset_of, teacher_of
from shoal.jobs.options import ARGUMENT, NewNetwork, Shared, check_network
from shoal.jobs.training import Job, prepare
from shoal.networks.assembly import own_network
from shoal.networks.spec import Spec
from shoal.networks.stored import save_network
from shoal.recipes import comparators, osakd
from shoal.recipes.lessons import Problem, Result, Teach, learn
from shoal.recipes.stages import Stages
from shoal.storage.origins import SIZING, Config, inherited
from shoal.storage.summary import Summary
from shoal.training.evaluation import evaluate
from shoal.training.schedule import Schedule

OSAKD = "osakd"
METHODS: dict[str, str] = {OSAKD: "its own outputs' nearest neighbours (OSAKD)"} | {
    name: method.summary for name, method in comparators.METHODS.items()
}
"""Every method by its name, with what the network learns from."""


@dataclass(frozen=True)
class Teaching:
    """The method of `shoal distill`, and the networks that it needs."""

    method: str = field(metadata=ARGUMENT | {"values": METHODS})
    """The method: what the network learns from."""
    teacher: Path | None = None
    """For kd, fitnet, at, spkd, rkd, overhaul and takd: the trained teacher, a run folder of shoal train."""
    assistant: str | None = None
    """For takd: the network that the teacher trains first and that then teaches the student, such as resnet56. It has
    the student's --width."""
    branches: int = 0
    """For dml, one and ffl: the number of networks or branches. 0 means the authors' number."""

    def check(self) -> None:
        """Raise ShoalError for an unknown method."""
        if self.method not in METHODS:
            raise ShoalError(f"found method {self.method!r}; need one of {', '.join(METHODS)}; choose one")


@dataclass(frozen=True)
class Neighbours:
    """The options of OSAKD; None means the default value."""

    k: int | None = None
    """For osakd: the number of neighbours of a sample; 8 if left out."""
    space: str | None = field(default=None, metadata={"values": SPACES})
    """For osakd: the space in which distances are measured; logits if left out."""
    loss: str | None = field(default=None, metadata={"values": LOSSES})
    """For osakd: the loss between the network's outputs and the labels of the neighbours; mse-sum if left out."""
    balance: float | None = None
    """For osakd: the weight of the cross-entropy (the paper's lambda), at least 0 and below 1; the preset's if left
    out."""
    bank: int | None = None
    """For osakd: how many outputs of earlier batches are searched for neighbours as well; 0 if left out."""
    include_self: bool = False
    """For osakd: count each sample among its own neighbours."""

    def given(self) -> dict[str, object]:
        """The options that are given, by the names under which a run records them."""
        found = {own.name: getattr(self, own.name) for own in fields(self) if own.name != "include_self"}
        found |= {"exclude_self": False if self.include_self else None}
        return {name: value for name, value in found.items() if value is not None}

    def options(self) -> osakd.Options:
        """The recipe's options."""
        usual = Neighbourhood()
        where = Neighbourhood(
            k=usual.k if self.k is None else self.k,
            space=usual.space if self.space is None else self.space,
            exclude_self=usual.exclude_self and not self.include_self,
            bank=usual.bank if self.bank is None else self.bank,
        )
        loss = osakd.Options().loss if self.loss is None else self.loss
        return osakd.Options(where, loss, self.balance)


@dataclass(frozen=True)
class Request(NewNetwork):
    """The student and its training; with a teacher, data and seed are those of the teacher's run."""

    model: str = field(metadata=ARGUMENT)
    """The student: a built-in network such as resnet18, or package.module:callable that returns an nn.Module."""
    data: str | None = field(default=None)  # type: ignore[assignment]  # a teacher's run has its own
    """The data set, as for shoal train. Leave it out with --teacher, whose run decides it."""
    data_dir: Path | None = None
    """Folder with the files of the data set, laid out as published. If left out: the folder of the teacher's run with
    --teacher, otherwise .data or /usr/share/datasets."""
    preset: str = "quick"
    """Preset of the training schedule: quick or paper; osakd also has paper-resnet and paper-tiny-imagenet."""
    seed: int | None = field(default=None)  # type: ignore[assignment]  # a teacher's run has its own
    """Seed of initial weights, batches and the validation split; 0 if left out. Leave it out with --teacher, whose run
    decides it."""

    def origin(self) -> Config:
        """Data, limit and seed of the options, for the configuration. Raises ShoalError without data."""
        if self.data is None:
            raise ShoalError("found no --data and no --teacher; need one of them; name a data set, or a teacher's run")
        return {"data": self.data, "data_dir": self.data_dir, "limit": self.limit, "seed": self.seed or 0}

    def check_taught(self) -> None:
        """Raise ShoalError for an option that the teacher's run decides (data, limit, seed and image options)."""
        said = [name for name in ("data", "limit", "seed", *SIZING) if getattr(self, name) is not None]
        if said:
            what = "images" if said[0] in SIZING else "data, limit and seed"
            raise ShoalError(f"found --{said[0]} with --teacher; need the {what} of the teacher's run; leave it out")


def distill(teaching: Teaching, request: Request, neighbours: Neighbours, shared: Shared) -> Summary:
    """Train a network by distillation, and its baseline, into a run folder; the distilled one is the run's network.

    With a teacher, data, seed and limit are those of its run. Raises ShoalError, before anything is written, for
    impossible options or networks.
    """
    teaching.check()
    shared.check("distill")
    teacher, origin = _teacher(teaching, request, shared.device)
    config = {"command": "distill"} | request.recorded() | vars(teaching) | {"neighbours": neighbours.given()} | origin
    prepared = prepare(config, request.data_dir, shared)
    spec = request.spec(prepared.data)
    check_one_classifier(own_network(spec), spec.base)
    method = _osakd if teaching.method == OSAKD else _compared
    teach, schedule = method(teaching, request, neighbours, (spec, prepared.data, teacher))
    if teaching.assistant is None:  # building the lesson would train an assistant
        teach(Problem(spec, schedule, Stages(prepared.data, shared.settings(config["seed"]))))
    job = prepared.fingerprinted(teacher=teacher).begin()
    with job.training({}, other=schedule.epochs) as stages:
        result = learn(Problem(spec, schedule, stages), teach)
    return _finish(job, teaching.method, result, teacher)


def _teacher(teaching: Teaching, request: Request, device: str) -> tuple[nn.Module | None, Config]:
    """The teacher, if any, and data, limit and seed, from the teacher's run or from the options."""
    if teaching.teacher is None:
        return None, request.origin()
    request.check_taught()
    _, network, origin = teacher_of(teaching.teacher)
    return network.to(device), inherited(origin)


Given = tuple[Spec, Dataset, nn.Module | None]
"""The student's spec, the data, and the teacher."""


def _osakd(teaching: Teaching, request: Request, neighbours: Neighbours, given: Given) -> tuple[Teach, Schedule]:
    """The lesson and schedule of OSAKD. Raises ShoalError for options that it does not use."""
    for name in ("teacher", "assistant", "branches"):
        if getattr(teaching, name):
            raise ShoalError(
                f"found --{name} with method osakd; need none, as the network is its own teacher; leave it out"
            )
    preset = preset_of(request.preset, osakd.PRESETS)()
    schedule = request.scheduled(preset.schedule)
    options = neighbours.options()
    osakd.check_options(options, given[1], schedule)
    return osakd.teach(options, preset), schedule


def _compared(teaching: Teaching, request: Request, neighbours: Neighbours, given: Given) -> tuple[Teach, Schedule]:
    """The lesson and schedule of any other method. Raises ShoalError for options that it does not use."""
    spec, _, teacher = given
    if odd := neighbours.given():
        raise ShoalError(
            f"found {min(odd)} with method {teaching.method!r}, where it has no effect; need method osakd "
            "for it; leave it out"
        )
    assistant = replace(spec, base=teaching.assistant) if teaching.assistant else None
    if assistant is not None:
        check_network(assistant)
    options = comparators.Options(teacher, assistant, teaching.branches)
    comparators.check_options(teaching.method, options, spec)
    presets = {"quick": osakd.quick().schedule, "paper": comparators.METHODS[teaching.method].schedule}
    schedule = request.scheduled(preset_of(request.preset, presets))
    return comparators.teach(teaching.method, options), schedule


def _finish(job: Job, method: str, result: Result, teacher: nn.Module | None) -> Summary:
    """Save the distilled network and the baseline, and write their figures."""
    save_network(job.run, result.spec, result.model)
    save_network(job.run, result.spec, result.baseline, "baseline")
    summary = Summary(
        data=job.data.name,
        model=result.spec.base,
        seed=job.settings.seed,
        method=method,
        baseline=job.figures(result.baseline, result.spec, result.histories["baseline"].on_test()),
        reduced=job.figures(result.model, result.spec, result.histories["distill"].on_test()),
        classifiers=evaluate(result.whole, job.data, job.data.test, job.settings),
        validation={name: history.best for name, history in result.histories.items()},
        selected_on=job.settings.select,
        teacher=None if teacher is None else job.figures(teacher, result.spec),
    )
    return job.finish(summary)
