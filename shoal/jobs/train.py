"""The job of `shoal train`: train a network with all of its ReLUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoal.data.augment import check_suits
from shoal.jobs.inputs import preset_of
from shoal.jobs.options import NewNetwork, Shared
from shoal.jobs.training import prepare
from shoal.networks.stored import save_network
from shoal.recipes import deepreduce, shallow
from shoal.recipes.stages import train_teacher
from shoal.storage.origins import Config
from shoal.storage.summary import Figures, write_alone
from shoal.training.loop import world
from shoal.training.schedule import Schedule


@dataclass(frozen=True)
class Request(NewNetwork):
    """The options of `shoal train`."""

    preset: str = "quick"
    """Preset of the training schedule: quick, paper or reference-code; deepreduce-paper or deepreduce-paper-cifar10 for
    a teacher of shoal reduce --recipe deepreduce; imagenet for ImageNet, with its usual augmentation."""

    def config(self) -> Config:
        """The settings that the run records."""
        names = ("data", "data_dir", "seed", "limit", "preset", "epochs", "model", "width", "resolution")
        more: Config = {"replaced": list(self.replaced)} if self.replaced else {}
        own = {name: getattr(self, name) for name in names} | more | self.training_settings()
        return {"command": "train"} | own | self.image_settings() | self.output_settings()


class Trained(Figures):
    """Figures of the trained network, and its run folder."""

    out: str


def train(request: Request, shared: Shared) -> Trained:
    """Train an all-ReLU network into a run folder.

    Raises ShoalError, before anything is written, for invalid options, networks or data; StoppedError when the time is
    up.
    """
    shared.check()
    preset = preset_of(request.preset, teacher_presets())
    schedule, augment = request.scheduled(preset.teacher), request.augment or preset.augment
    prepared = prepare(request.config(), request.data_dir, shared)
    if augment is not None:
        check_suits(augment, prepared.data.train.images)
    spec = request.spec(prepared.data)
    job = prepared.fingerprinted().begin()
    with job.training({"teacher": schedule.epochs}) as stages:
        network, history = train_teacher(spec, schedule, stages.changed(augment=augment))
    first = world()[0] == 0
    if first:
        save_network(job.run, spec, network)
    found = job.figures(network, spec, history.on_test())
    if first:
        write_alone(job.run, prepared.data.name, spec.base, found)
        job.draw_curves()
    return Trained(**found | {"best_epoch": history.best_epoch, "validation": history.best}, out=str(shared.out))


@dataclass(frozen=True)
class Preset:
    """The schedule of a training, and its augmentation; None means that of the data set."""

    teacher: Schedule
    augment: str | None = None


IMAGENET = Preset(Schedule(90, 0.1, (30, 60, 80), batch_size=256, weight_decay=1e-4), "resized-crop-flip")
"""The usual training on ImageNet: 90 epochs, the rate divided by 10 after 30, 60 and 80 (He et al., CVPR'16)."""


def teacher_presets() -> dict[str, Preset]:
    """The presets that have a schedule for teachers; names of DeepReDuce's start with ``deepreduce-``."""
    others = {f"deepreduce-{name}": make for name, make in deepreduce.PRESETS.items() if name != "quick"}
    makers: dict[str, Callable[[], shallow.Preset | deepreduce.Preset]] = {**shallow.PRESETS, **others}
    return {name: Preset(make().teacher) for name, make in makers.items()} | {"imagenet": IMAGENET}
