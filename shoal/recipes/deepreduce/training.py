"""Training of DeepReDuce's networks: one per stage to measure criticality, the baseline, and the designs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from shoal.distillation.losses import kd
from shoal.networks.assembly import assemble
from shoal.networks.figures import figures
from shoal.networks.spec import Spec
from shoal.networks.stored import save_network
from shoal.recipes.deepreduce.designs import criticality
from shoal.recipes.deepreduce.merging import accountings
from shoal.recipes.deepreduce.space import DesignSpace, Planned
from shoal.recipes.stages import Stages
from shoal.storage.origins import Config, inherited
from shoal.storage.run import Run
from shoal.storage.summary import CriticalityRow, Figures, Summary
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule


@dataclass(frozen=True)
class Preset:
    """Schedules and loss weights. The baseline has the schedule `design`, too, but no distillation."""

    teacher: Schedule
    criticality: Schedule
    design: Schedule
    kd_weight: float = 0.9
    """Weight of distillation in the loss; that of cross-entropy is 1 minus it."""
    temperature: float = 4.0
    student_from_teacher: bool = False
    """Start from the teacher's weights, not random ones. Networks with other tensor shapes (narrower ones) cannot."""


@dataclass(frozen=True)
class Teaching:
    """What the networks of a grid learn from.

    `network` is the trained network that teaches; None means the unreduced network of the grid. Without `designs`, the
    designs learn from labels only. Criticality is measured with distillation in both cases (equation 1).
    """

    network: nn.Module | None = None
    designs: bool = True


class Trainer:
    """Trains networks of `space` in the run folder of `stages`, and in run folders inside it.

    Raises ShoalError when `stages` has no run.
    """

    def __init__(self, space: DesignSpace, preset: Preset, stages: Stages, teaching: Teaching | None = None) -> None:
        self.space, self.preset, self.stages, self.run = space, preset, stages, stages.folder
        self.teaching = teaching or Teaching()
        self.teacher = space.teacher if self.teaching.network is None else self.teaching.network
        self.labels = Objective((cross_entropy(),))
        weight = preset.kd_weight
        self.distilled = Objective((cross_entropy(1 - weight), kd(weight, preset.temperature)))

    def criticality(self) -> dict[int, float]:
        """Criticality of every stage, from validation accuracy; kept in `criticality.json`."""
        if self.run.has("criticality.json"):
            return {row["stage"]: row["criticality"] for row in self.run.read_json("criticality.json")}
        sites, stages = self.space.sites, self.space.stages
        accuracy = {k: self._alone(k) for k in stages}
        found = criticality(accuracy, sites)
        relus = {k: sum(site.relus for site in sites if site.stage == k) for k in stages}
        rows = [CriticalityRow(stage=k, relus=relus[k], accuracy=accuracy[k], criticality=found[k]) for k in stages]
        self.run.write_json("criticality.json", rows)
        return found

    def _alone(self, stage: int) -> float:
        """Validation accuracy, in percent, of the network with the ReLUs of one stage only."""
        model, name = self.network(self.space.alone(stage)), f"criticality-S{stage}"
        return self.stages.fit(name, model, self.distilled, self.preset.criticality, teacher=self.teacher).best

    def network(self, spec: Spec) -> nn.Module:
        """The network of `spec` before training. Its weights do not depend on what has been trained before."""
        torch.manual_seed(self.stages.settings.seed)
        model = assemble(spec, self.space.base(spec))
        if self.preset.student_from_teacher:
            inherit(model, self.space.teacher)
        return model

    def baseline(self) -> Figures:
        """Figures of the all-ReLU network, trained by cross-entropy for as many epochs as a design."""
        return self._trained("baseline", self.space.spec, self.labels, None)

    def design(self, planned: Planned) -> Figures:
        """Train one design as `Teaching` says; returns its figures. Its run's summary also holds the baseline."""
        name = f"designs/{planned.name}"
        distilled = self.teaching.designs
        objective, teacher = (self.distilled, self.teacher) if distilled else (self.labels, None)
        reduced = self._trained(name, planned.spec, objective, teacher)
        settings = self.stages.settings
        summary = Summary(
            data=self.stages.data.name,
            model=planned.spec.base,
            seed=settings.seed,
            baseline=self.baseline(),
            reduced=reduced,
            selected_on=settings.select,
            design=planned.name,
        )
        summary.write(Run(self.run.folder / name))
        return reduced

    def _trained(self, name: str, spec: Spec, objective: Objective, teacher: nn.Module | None) -> Figures:
        """Figures of the network trained in the run folder `name`; a finished one is read, not trained again."""
        own = self.run.below(name, self._config(name))
        if own.has("figures.json"):
            read: Figures = own.read_json("figures.json")
            return read
        model = self.network(spec)
        history = self.stages.at(own, name.rpartition("/")[2]).fit(
            "train", model, objective, self.preset.design, teacher=teacher
        )
        save_network(own, spec, model)
        found = figures(model, self.stages.data, spec, self.stages.settings)
        found["validation"], found["best_epoch"] = history.best, history.best_epoch
        found["merging"] = accountings(spec, model, assemble(replace(spec, dropped=()), self.space.base(spec)))
        own.write_json("figures.json", found)
        return found

    def _config(self, name: str) -> Config:
        above = self.run.read_json("config.json") if self.run.has("config.json") else {}
        taught = {} if self.teaching.designs else {"kd": False}
        return inherited(above) | {"command": f"reduce, {name}", "preset": self.preset} | taught


def inherit(student: nn.Module, teacher: nn.Module) -> bool:
    """Copy the teacher's weights into `student` if the teacher has all of its tensors in the same shapes.

    Returns whether they were copied.
    """
    own, given = student.state_dict(), teacher.state_dict()
    fits = all(name in given and given[name].shape == value.shape for name, value in own.items())
    if fits:
        student.load_state_dict({name: given[name] for name in own})
    return fits
