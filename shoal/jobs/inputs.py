"""What jobs are given: options, data sets, networks and teachers, checked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from torch import nn

from shoal.data.clouds import is_cloud
from shoal.data.dataset import Dataset
from shoal.data.loading import load
from shoal.errors import ShoalError
from shoal.models import CLOUDS, NAMES
from shoal.networks.assembly import own_network
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network
from shoal.recipes.stages import check_teacher
from shoal.storage.files import read_json
from shoal.storage.origins import Config, placed
from shoal.storage.run import Run, summary_writer
from shoal.storage.shards import check_limit
from shoal.surgery.tracing import check_trace, trace
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings


def parse_shape(text: str) -> tuple[int, int, int]:
    """(C, H, W) of text like 3x32x32. Raises ShoalError otherwise."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ShoalError(f"found --input {text!r}; need channels x height x width, such as 3x32x32")
    c, h, w = (int(p) for p in parts)
    return c, h, w


def input_shape(size: str | None, model: str) -> tuple[int, int, int]:
    """What `size` says, or without it 3x32x32, and 3x1024x1 for a point cloud network of the zoo."""
    return parse_shape(size or ("3x1024x1" if model in CLOUDS else "3x32x32"))


HIDDEN = {"cli": None}
"""Metadata of a field that is no option of a command."""
LINK = {"cli": ("--link", "--network")}
"""Metadata of a field for the link between two parties, which has an older name, too."""
ARGUMENT = {"cli": "argument"}
"""Metadata of a field that is typed without the name of an option."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Shared:
    """Options that all commands have that train."""

    out: Path
    """The folder to write. It must be new or empty, unless --resume is given."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: str = "fp32"
    """fp32, or bf16 (autocast)."""
    step: str = "eager"
    """How a training step runs: eager, compiled, graph (a CUDA graph) or compiled-graph; see docs/gpu.md."""
    max_seconds: float | None = None
    """Stop at a checkpoint before this many seconds have passed, counted over all stages."""
    save_seconds: float = 0.0
    """The least seconds between two checkpoints; 0 saves after each epoch. A stop always saves one."""
    shard_mb: float | None = None
    """Write weights and optimiser state in files of at most this many MB."""
    resume: bool = False
    """Continue from the last checkpoint in --out."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs shoal[tensorboard])."""
    stop: Callable[[], bool] = field(default=_never, metadata=HIDDEN)
    """Asked before each step: whether to stop at a checkpoint."""
    begun: float = field(default_factory=time.monotonic, metadata=HIDDEN)
    """When the command began; the time before training counts towards `max_seconds`."""

    @property
    def shard_bytes(self) -> int | None:
        """The limit in bytes. Raises ShoalError for one that is too small."""
        if self.shard_mb is None:
            return None
        check_limit(1e6 * self.shard_mb)
        return int(1e6 * self.shard_mb)

    def recorded(self, config: Config) -> Config:
        """The configuration with the precision, where it is not fp32: of these options it alone decides the result."""
        return config | ({"precision": self.precision} if self.precision != "fp32" else {})

    def run(self, config: Config) -> Run:
        """The run at `out`, new or resumed with the same precision. Raises ShoalError as `Run.create` does."""
        return Run.create(self.out, self.recorded(config), self.resume, self.shard_bytes)

    def settings(self, seed: int) -> Settings:
        """Settings for training that begins now. Raises ShoalError for a value that has no meaning."""
        limit = self.max_seconds
        if limit is not None and limit > 0:
            limit = max(0.0, limit - (time.monotonic() - self.begun))
        return Settings(
            seed, self.device, self.precision, max_seconds=limit, resume=self.resume, stop=self.stop, step=self.step,
            save_seconds=self.save_seconds,
        )  # fmt: skip

    def check(self, alone: str | None = None) -> None:
        """Raise ShoalError for what this machine cannot do, and when `out` holds something other than a run.

        `alone` names a command that trains in one process, which torchrun must not start.
        """
        if alone is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ShoalError(f"found {alone} under torchrun; need one process; use torchrun for shoal train")
        self.settings(0).check()
        _ = self.shard_bytes  # raises
        if self.tensorboard:
            summary_writer()
        run, first = Run(self.out), os.environ.get("RANK", "0") == "0"
        if first and not run.has("config.json"):  # the other processes of torchrun may find what the first has made
            run.check_free()


@dataclass(frozen=True)
class NewNetwork:
    """A network to train from new weights, its data set, and for how long."""

    model: str = field(metadata=ARGUMENT)
    """A network of the zoo, such as resnet18, or package.module:callable that returns an nn.Module."""
    data: str = field()
    """digits, fashion-mnist, cifar10, cifar100, svhn, tiny-imagenet, modelnet10, modelnet40, or a folder of images."""
    data_dir: Path | None = None
    """Where the data set is, in its published layout."""
    width: float = 1.0
    """Multiplies the channels of a zoo network."""
    resolution: float = 1.0
    """Multiplies the height and width of a zoo network's feature maps: 1, 0.5 or 0.25."""
    preset: str = "quick"
    """Training schedule and losses."""
    epochs: int | None = None
    """Number of epochs, instead of the preset's."""
    limit: int | None = None
    """Use only this many training images."""
    replaced: tuple[str, ...] = field(default=(), metadata={"cli": "--replace"})
    """Replace layers before training, such as relu6=relu,max_pool=avg_pool (repeatable)."""
    seed: int = 0
    """Decides initial weights, batches and the validation split."""

    def spec(self, data: Dataset) -> Spec:
        """The network's spec for this data set. Raises ShoalError as `check_network` does."""
        spec = Spec(self.model, data.classes, data.shape, self.width, self.resolution, replaced=self.replaced)
        check_network(spec)
        return spec


@dataclass(frozen=True)
class Named:
    """A network by its name, not trained."""

    model: str = field(metadata=ARGUMENT)
    """A network of the zoo, such as resnet18, or package.module:callable that returns an nn.Module."""
    input: str | None = None
    """Input size, channels x height x width; 3x32x32 unless given, 3x1024x1 for point clouds."""
    classes: int = 10
    """Number of classes."""
    width: float = 1.0
    """Multiplies the channels of a zoo network."""
    resolution: float = 1.0
    """Multiplies the height and width of a zoo network's feature maps: 1, 0.5 or 0.25."""
    replaced: tuple[str, ...] = field(default=(), metadata={"cli": "--replace"})
    """Replace layers first, such as relu6=relu,max_pool=avg_pool (repeatable)."""

    def spec(self) -> Spec:
        """The network's spec. Raises ShoalError for an impossible size."""
        shape = input_shape(self.input, self.model)
        return Spec(self.model, self.classes, shape, self.width, self.resolution, replaced=self.replaced)


@dataclass(frozen=True)
class Subject:
    """A run's network, or a network by its name."""

    target: str = field(metadata=ARGUMENT)
    """A run folder of shoal train or reduce, a network of the zoo, or package.module:callable."""
    input: str = "3x32x32"
    """Input size of a network given by name, channels x height x width."""
    classes: int = 10
    """Number of classes of a network given by name."""
    width: float = 1.0
    """Multiplies the channels of a zoo network."""
    resolution: float = 1.0
    """Multiplies the height and width of a zoo network's feature maps: 1, 0.5 or 0.25."""

    @property
    def run(self) -> Run | None:
        """The run, if the target is a folder."""
        return Run(self.target) if Path(self.target).is_dir() else None

    def spec(self) -> Spec:
        """The spec of a network given by name. Raises ShoalError for an impossible size."""
        return Spec(self.target, self.classes, parse_shape(self.input), self.width, self.resolution)


T = TypeVar("T")


def preset_of(name: str, presets: Mapping[str, T]) -> T:
    """The preset of this name. Raises ShoalError, with all names, when there is none."""
    if name not in presets:
        raise ShoalError(f"found preset {name!r}; need one of {', '.join(presets)}; choose one")
    return presets[name]


def epochs_of(text: str, stages: Sequence[str]) -> tuple[int, ...]:
    """Numbers of epochs such as ``2,6,16``, one for each of `stages`. Raises ShoalError for anything else."""
    parts = text.split(",")
    if len(parts) != len(stages) or not all(part.strip().isdigit() for part in parts):
        raise ShoalError(f"found --epochs {text!r}; need {len(stages)} numbers: {','.join(stages)}; correct it")
    return tuple(int(part) for part in parts)


def load_data(config: Config, data_dir: Path | None, device: str = "cpu") -> Dataset:
    """The data set of a run's configuration, under `data_dir` or where it lay."""
    there = placed(config, data_dir)
    return load(there["data"], there.get("data_dir"), seed=config["seed"], limit=config.get("limit")).to(device)


def check_network(spec: Spec) -> None:
    """Raise ShoalError unless the base network can be built, is the same traced, and has a logit for each class.

    Networks of the zoo must be for the kind of data: convolutions over the order of points learn nothing of a cloud.
    """
    if is_cloud(spec.shape) and spec.base in NAMES:
        raise ShoalError(
            f"found {spec.base} for point clouds; need one of {', '.join(CLOUDS)}, or your own; choose one"
        )
    network = own_network(spec)
    check_trace(network, spec.shape)
    graph = trace(network, spec.shape)
    logits = graph[graph.outputs[-1]].shape
    if len(logits) != 1 or logits[0] < spec.classes:
        raise ShoalError(
            f"found a result of shape {logits} an image from {spec.base!r}; need {spec.classes} logits, one a class; "
            "change its last layer"
        )


def longer(schedule: Schedule, epochs: int | None) -> Schedule:
    """The schedule over another number of epochs, its drops moved in proportion."""
    if epochs is None:
        return schedule
    if epochs < 1:
        raise ShoalError(f"found {epochs} epochs; need 1 or more")
    part = epochs / schedule.epochs
    return replace(schedule, epochs=epochs, milestones=tuple(max(1, round(m * part)) for m in schedule.milestones))


def teacher_of(folder: Path) -> tuple[Spec, nn.Module, Config]:
    """The spec, network and configuration of a teacher's run. Raises ShoalError for a network reduced already."""
    source = Run(folder)
    spec, network = load_network(source)
    check_teacher(spec)
    return spec, network, source.config()


def inherited(origin: Config) -> Config:
    """The data, limit and seed of the run that another begins with, for that one's configuration."""
    return {name: origin.get(name) for name in ("data", "data_dir", "seed", "limit")}


def given_sensitivity(path: Path | None) -> dict[str, float] | None:
    """The sensitivities in a JSON file. Raises ShoalError unless they are numbers by name."""
    if path is None:
        return None
    body = read_json(path)
    numbers = isinstance(body, dict) and all(isinstance(v, (int, float)) for v in body.values())
    if not body or not numbers:
        raise ShoalError(f"found no sensitivities at {path}; need JSON with a number for each site; mend the file")
    return dict(body)
