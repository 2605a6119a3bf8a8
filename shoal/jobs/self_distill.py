"""What `shoal self-distill` does: check everything, train a network with several classifiers, save each as a run."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from shoal.data.augment import check_suits
from shoal.data.dataset import Dataset
from shoal.errors import ShoalError
from shoal.exits.classifiers import keep_exit
from shoal.exits.figures import exit_figures
from shoal.jobs.inputs import Shared, check_network, load_data, longer, teacher_of
from shoal.networks.figures import figures
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network, save_network
from shoal.progress import bars
from shoal.recipes import self_distill
from shoal.report import plot_curves
from shoal.storage.environment import environment
from shoal.storage.origins import began
from shoal.storage.run import Run
from shoal.training.settings import Settings


@dataclass(frozen=True)
class Source:
    """What to begin with: a run folder, whose weights, data and seed are taken, or a network's name and a data set."""

    name: str
    data: str | None = None
    data_dir: Path | None = None
    width: float = 1.0
    resolution: float = 1.0
    limit: int | None = None
    replaced: tuple[str, ...] = ()

    @property
    def is_run(self) -> bool:
        """Whether the name is that of a run folder."""
        return Run(self.name).has("config.json")

    def config(self, seed: int) -> dict[str, Any]:
        """Data, seed and network of the run to be made. Raises ShoalError for options that do not go together."""
        if not self.is_run:
            if self.data is None:
                raise ShoalError(f"found no data for {self.name!r}; need a data set, or a run that has one; use --data")
            body: dict[str, Any] = {"data": self.data, "data_dir": self.data_dir, "seed": seed, "limit": self.limit}
            return body | {"model": self.name, "width": self.width, "resolution": self.resolution}
        usual = Source(self.name, data_dir=self.data_dir)
        odd = [name for name in vars(self) if getattr(self, name) != getattr(usual, name)]
        if odd or seed:
            name = {"replaced": "replace"}.get(odd[0], odd[0]) if odd else "seed"
            raise ShoalError(f"found --{name} with the run {self.name}; need what that run has; leave it out")
        origin = Run(self.name).config()
        return {k: origin.get(k) for k in ("data", "data_dir", "seed", "limit")} | {"source": self.name}

    def network(self, data: Dataset) -> tuple[Spec, nn.Module | None]:
        """The plain network's spec, and the weights to begin with."""
        if self.is_run:
            return load_network(Run(self.name))
        spec = Spec(self.name, data.classes, data.shape, self.width, self.resolution, replaced=self.replaced)
        check_network(spec)
        return spec, None


def distill(
    source: Source,
    preset: str,
    epochs: int | None,
    options: self_distill.Options,
    shared: Shared,
    teacher: Path | None = None,
) -> dict[str, Any]:
    """Train a network with several classifiers, and the plain one beside it, into a run folder.

    The run's own network has all classifiers; each alone is a run in `exits/1`, `exits/2`, ..., weak to strong. Raises
    ShoalError, before anything is written, for what cannot be trained.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ShoalError("found self-distill under torchrun; need one process; use torchrun for shoal train")
    shared.check()
    plan, config = _preset(preset, epochs), source.config(shared.seed)
    data = load_data(config, source.data_dir, shared.device)
    spec, base = source.network(data)
    options = options.settled(spec.shape)
    check_suits(options.applied(plan).augment or data.augment, data.train.images)
    network = _teacher(teacher, config, shared)
    self_distill.check_options(options, options.applied(plan), spec, base, network)
    config |= {"command": "self-distill", "preset": preset, "epochs": epochs, "options": options, "teacher": teacher}
    run = shared.run(began(config, data, source.data_dir, source=base, teacher=network))
    settings = shared.settings(config["seed"])
    stages = ["baseline", "self-distillation"] if options.baseline else ["self-distillation"]
    with bars(dict.fromkeys(stages, plan.schedule.epochs)) as shown:
        result = self_distill.distill(
            spec, data, options, plan, settings,
            base=base, teacher=network, run=run, listen=shown.listen, tensorboard=shared.tensorboard,
        )  # fmt: skip
    return _save(run, result, spec, data, replace(settings, select=plan.select))


def _teacher(folder: Path | None, config: dict[str, Any], shared: Shared) -> nn.Module | None:
    """The trained network in `folder`. Raises ShoalError unless it saw the same images."""
    if folder is None:
        return None
    _, network, origin = teacher_of(folder, shared)
    for name in ("data", "limit", "seed"):
        if origin.get(name) != config.get(name):
            raise ShoalError(
                f"found --{name} {config.get(name)} and a teacher of {name} {origin.get(name)}; need the same, for the "
                "validation split to be the same; train a teacher on it"
            )
    return network.to(shared.device)


def _preset(name: str, epochs: int | None) -> self_distill.Preset:
    if name not in self_distill.PRESETS:
        raise ShoalError(f"found preset {name!r}; need one of {', '.join(self_distill.PRESETS)}")
    plan = self_distill.PRESETS[name]()
    schedule = longer(plan.schedule, epochs)
    return replace(plan, schedule=schedule, release=min(plan.release, schedule.epochs - 1))


def _save(run: Run, result: self_distill.Result, plain: Spec, data: Dataset, settings: Settings) -> dict[str, Any]:
    """Write the networks and their figures."""
    save_network(run, result.spec, result.model)
    found = exit_figures(result.model, data, data.test, settings)
    last = len(found["exits"]) - 1
    for index in range(last + 1):
        own = replace(result.spec, kept_exit=index)
        part = run.below(f"exits/{index + 1}")
        save_network(part, own, keep_exit(result.model, index))
    final = figures(keep_exit(result.model, last), data, result.spec, settings)
    body = {"data": data.name, "model": plain.base, "seed": settings.seed, "after": result.spec.exits} | found
    body |= {"reduced": final, "selected_on": settings.select, "environment": environment()}
    if result.baseline is not None:
        save_network(run, plain, result.baseline, "baseline")
        body["baseline"] = figures(result.baseline, data, plain, settings)
    run.write_json("summary.json" if result.baseline is not None else "exits.json", body)
    plot_curves(run, run.folder / "curves.png")
    return body
