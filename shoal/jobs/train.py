"""The job of `shoal train`: train a network with all of its ReLUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoal.jobs.inputs import preset_of
from shoal.jobs.options import NewNetwork, Shared
from shoal.jobs.training import prepare
from shoal.networks.stored import save_network
from shoal.recipes import deepreduce, shallow
from shoal.recipes.stages import train_teacher
from shoal.storage.origins import Config
from shoal.storage.summary import Figures, write_alone
from shoal.training.loop import world


@dataclass(frozen=True)
class Request(NewNetwork):
    """The options of `shoal train`."""

    preset: str = "quick"
    """Preset of the training schedule: quick, paper or reference-code; deepreduce-paper or deepreduce-paper-cifar10 for
    a teacher of shoal reduce --recipe deepreduce."""

    def config(self) -> Config:
        """The settings that the run records."""
        names = ("data", "data_dir", "seed", "limit", "preset", "epochs", "model", "width", "resolution")
        more: Config = {"replaced": list(self.replaced)} if self.replaced else {}
        own = {name: getattr(self, name) for name in names} | more | self.training_settings()
        return {"command": "train"} | own | self.image_settings()


class Trained(Figures):
    """Figures of the trained network, and its run folder."""

    out: str


def train(request: Request, shared: Shared) -> Trained:
    """Train an all-ReLU network into a run folder.

    Raises ShoalError, before anything is written, for invalid options, networks or data; StoppedError when the time is
    up.
    """
    shared.check()
    schedule = request.scheduled(preset_of(request.preset, _teachers())().teacher)
    prepared = prepare(request.config(), request.data_dir, shared)
    spec = request.spec(prepared.data)
    job = prepared.fingerprinted().begin()
    with job.training({"teacher": schedule.epochs}) as stages:
        network, history = train_teacher(spec, schedule, stages)
    first = world()[0] == 0
    if first:
        save_network(job.run, spec, network)
    found = job.figures(network, spec, history.on_test())
    if first:
        write_alone(job.run, prepared.data.name, spec.base, found)
        job.draw_curves()
    return Trained(**found | {"best_epoch": history.best_epoch, "validation": history.best}, out=str(shared.out))


def _teachers() -> dict[str, Callable[[], shallow.Preset | deepreduce.Preset]]:
    """The presets that have a schedule for teachers; names of DeepReDuce's start with ``deepreduce-``."""
    others = {f"deepreduce-{name}": make for name, make in deepreduce.PRESETS.items() if name != "quick"}
    return {**shallow.PRESETS, **others}
