"""The job of `shoal self-distill`: train a network with several classifiers, and save each as a run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from shoal.data.augment import check_suits
from shoal.data.dataset import Dataset
from shoal.errors import ShoalError
from shoal.exits.classifiers import keep_exit
from shoal.exits.figures import exit_figures
from shoal.jobs.inputs import other_teacher, preset_of
from shoal.jobs.options import ARGUMENT, NewNetwork, Shared
from shoal.jobs.training import Job, prepare
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network, save_network
from shoal.recipes import self_distill
from shoal.storage.origins import CACHE, SIZING, Config, inherited
from shoal.storage.run import Run
from shoal.storage.summary import Summary


@dataclass(frozen=True)
class Request(NewNetwork):
    """The options of `shoal self-distill`, which starts from a run (its weights, data and seed) or from new weights."""

    model: str = field(metadata=ARGUMENT)
    """A built-in network such as resnet18, package.module:callable that returns an nn.Module, or a run folder of shoal
    train."""
    data: str | None = field(default=None)  # type: ignore[assignment]  # a run has its own
    """The data set, as for shoal train. Leave it out for a run folder, which has its own."""
    data_dir: Path | None = None
    """Folder with the data set in its published layout. If left out: for a run folder its own, and otherwise .data or
    /usr/share/datasets."""
    preset: str = field(default="quick", metadata={"values": self_distill.PRESETS})
    """Preset of training schedule and loss."""
    teacher: Path | None = None
    """For --beside kd or at: the teacher, a run folder of shoal train with the same data, limit and seed."""

    @property
    def is_run(self) -> bool:
        """Whether the model is a run folder."""
        return Run(self.model).has("config.json")

    def config(self) -> Config:
        """The settings that the run records. Raises ShoalError for options that contradict each other."""
        own = {"command": "self-distill", "preset": self.preset, "epochs": self.epochs, "teacher": self.teacher}
        own |= {name: value for name, value in self.training_settings().items() if name != "augment"}
        if self.is_run:
            self._check_run()
            cache = {} if self.cache is None else {CACHE: self.cache}
            return own | inherited(Run(self.model).config()) | {"source": self.model} | cache
        if self.data is None:
            raise ShoalError(f"found no data for {self.model!r}; need a data set, or a run that has one; use --data")
        return (
            own
            | {
                name: getattr(self, name)
                for name in ("data", "data_dir", "seed", "limit", "model", "width", "resolution")
            }
            | ({"replaced": list(self.replaced)} if self.replaced else {})
            | self.image_settings()
            | self.output_settings()
        )

    def _check_run(self) -> None:
        """Raise ShoalError for an option that the given run decides."""
        names = ("data", "width", "resolution", "limit", "replaced", "output", "seed", *SIZING)
        usual = Request(self.model)
        odd = [name for name in names if getattr(self, name) != getattr(usual, name)]
        if odd:
            name = {"replaced": "replace"}.get(odd[0], odd[0])
            raise ShoalError(f"found --{name} with the run {self.model}; need what that run has; leave it out")

    def network(self, data: Dataset) -> tuple[Spec, nn.Module | None]:
        """The plain network's spec, and the run's network to start from, or None for new weights."""
        return load_network(Run(self.model)) if self.is_run else (self.spec(data), None)

    def schedules(self) -> self_distill.Preset:
        """The preset with the chosen schedule and number of epochs. Raises ShoalError for an unknown preset."""
        preset = preset_of(self.preset, self_distill.PRESETS)()
        schedule = self.scheduled(preset.schedule)
        return replace(preset, schedule=schedule, release=min(preset.release, schedule.epochs - 1))


def distill(request: Request, options: self_distill.Options, shared: Shared) -> Summary:
    """Train a network with several classifiers, and the plain network as the baseline, into a run folder.

    The run's network has all classifiers. Each classifier alone is a run in `exits/1`, `exits/2`, ..., from weak to
    strong. Raises ShoalError, before anything is written, for impossible options or networks.
    """
    shared.check("self-distill")
    preset, config = request.schedules(), request.config()
    prepared = prepare(config, request.data_dir, shared)
    data = prepared.data
    spec, base = request.network(data)
    options = options.settled(spec.shape)
    if request.augment is not None:  # a run of this command records the augmentation with the options of its recipe
        options = replace(options, augment=request.augment)
    check_suits(options.applied(preset).augment or data.augment, data.train.images)
    _, teacher = other_teacher(request.teacher, config, shared.device)
    self_distill.check_options(options, options.applied(preset), spec, base, teacher)
    prepared = replace(prepared, config=config | {"options": options})
    job = prepared.fingerprinted(source=base, teacher=teacher).begin()
    names = ["baseline", "self-distillation"] if options.baseline else ["self-distillation"]
    with job.training(dict.fromkeys(names, preset.schedule.epochs)) as stages:
        result = self_distill.distill(spec, options, preset, stages, base, teacher)
    return _finish(job, result, spec, preset.select)


def _finish(job: Job, result: self_distill.Result, plain: Spec, select: str) -> Summary:
    """Save the network, each of its classifiers and the baseline, and write their figures."""
    save_network(job.run, result.spec, result.model)
    found = exit_figures(result.model, job.data, job.data.test, job.settings)
    last = len(found["exits"]) - 1
    for index in range(last + 1):
        part = job.run.below(f"exits/{index + 1}")
        save_network(part, replace(result.spec, kept_exit=index), keep_exit(result.model, index))
    baseline = None
    if result.baseline is not None:
        save_network(job.run, plain, result.baseline, "baseline")
        baseline = job.figures(result.baseline, plain, result.histories["baseline"].on_test())
    summary = Summary(
        data=job.data.name,
        model=plain.base,
        seed=job.settings.seed,
        baseline=baseline,
        reduced=job.figures(
            keep_exit(result.model, last), result.spec, result.histories["self-distillation"].on_test()
        ),
        selected_on=select,
        after=result.spec.exits,
        exits=found["exits"],
        ensemble=found["ensemble"],
    )
    return job.finish(summary, "exits.json" if result.baseline is None else "summary.json")
