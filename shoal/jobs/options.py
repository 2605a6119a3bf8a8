"""Options that several commands share: what they train, on which data, and where they write."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shoal.data.augment import CLOUD_POLICIES, POLICIES
from shoal.data.clouds import is_cloud
from shoal.data.dataset import Dataset
from shoal.data.images import FITS
from shoal.errors import ShoalError
from shoal.jobs.inputs import longer
from shoal.models import CLOUDS, NAMES
from shoal.networks.adoption import check_logits
from shoal.networks.assembly import located, own_network
from shoal.networks.spec import Spec
from shoal.storage.origins import CACHE, SIZING, Config
from shoal.storage.run import Run, summary_writer
from shoal.storage.shards import check_limit
from shoal.training.schedule import Schedule, parse_schedule
from shoal.training.settings import Settings


def parse_shape(text: str) -> tuple[int, int, int]:
    """The shape (C, H, W) in text such as 3x32x32. Raises ShoalError for any other text."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ShoalError(f"found --input {text!r}; need channels x height x width, such as 3x32x32")
    c, h, w = (int(p) for p in parts)
    return c, h, w


def input_shape(size: str | None, model: str) -> tuple[int, int, int]:
    """The shape (C, H, W) in `size`; without `size` 3x32x32, or 3x1024x1 for a built-in network for point clouds."""
    return parse_shape(size or ("3x1024x1" if model in CLOUDS else "3x32x32"))


def parse_size(text: str) -> int | list[int]:
    """The size of images in text such as 224 or 224x160 (height x width); one number if both sides are equal.

    Raises ShoalError for any other text.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
        raise ShoalError(f"found --size {text!r}; need pixels such as 224, or height x width such as 224x160")
    sides = [int(p) for p in parts]
    return sides if len({*sides}) > 1 else sides[0]


HIDDEN = {"cli": None}
"""Metadata of a field that is not an option of a command."""
LINK = {"cli": ("--link", "--network")}
"""Metadata of a field for the link between two parties; the option also has an older name."""
ARGUMENT = {"cli": "argument"}
"""Metadata of a field that is a positional argument of a command."""


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Shared:
    """Options of all commands that train."""

    out: Path
    """The run folder to write. It must be new or empty, unless --resume is given."""
    device: str = "cpu"
    """Device to compute on: cpu or cuda."""
    precision: str = "fp32"
    """Precision of training: fp32, or bf16 (autocast)."""
    step: str = "eager"
    """How a training step runs: eager, compiled, graph (a CUDA graph) or compiled-graph; see docs/gpu.md."""
    max_seconds: float | None = None
    """Stop at a checkpoint before this many seconds have passed, all stages together."""
    save_seconds: float = 0.0
    """Save checkpoints at least this many seconds apart; 0 saves one after each epoch. One is always saved when
    training stops."""
    shard_mb: float | None = None
    """Write weights and optimiser state in files of at most this many MB."""
    resume: bool = False
    """Continue from the last checkpoint in --out."""
    tensorboard: bool = False
    """Also write TensorBoard events into --out (needs shoal[tensorboard])."""
    stop: Callable[[], bool] = field(default=_never, metadata=HIDDEN)
    """Called before each step; true means stop at a checkpoint."""
    begun: float = field(default_factory=time.monotonic, metadata=HIDDEN)
    """When the command began (`time.monotonic`), because time before training counts towards `max_seconds`."""

    @property
    def shard_bytes(self) -> int | None:
        """`shard_mb` in bytes. Raises ShoalError for too small a limit."""
        if self.shard_mb is None:
            return None
        check_limit(1e6 * self.shard_mb)
        return int(1e6 * self.shard_mb)

    def recorded(self, config: Config) -> Config:
        """`config`, with the precision if it is not fp32. The other shared options do not affect the result."""
        return config | ({"precision": self.precision} if self.precision != "fp32" else {})

    def run(self, config: Config) -> Run:
        """The run in the folder `out`, new or resumed. Raises ShoalError as `Run.create` does."""
        return Run.create(self.out, self.recorded(config), self.resume, self.shard_bytes)

    def settings(self, seed: int) -> Settings:
        """Settings for training that begins now. Raises ShoalError for an invalid value."""
        limit = self.max_seconds
        if limit is not None and limit > 0:
            limit = max(0.0, limit - (time.monotonic() - self.begun))
        return Settings(
            seed, self.device, self.precision, max_seconds=limit, resume=self.resume, stop=self.stop, step=self.step,
            save_seconds=self.save_seconds,
        )  # fmt: skip

    def check(self, alone: str | None = None) -> None:
        """Raise ShoalError for options that this machine cannot satisfy, and when `out` holds anything but a run.

        `alone` names a command that cannot run under torchrun because it trains in one process.
        """
        if alone is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ShoalError(f"found {alone} under torchrun; need one process; use torchrun for shoal train")
        self.settings(0).check()
        _ = self.shard_bytes  # raises
        if self.tensorboard:
            summary_writer()
        run, first = Run(self.out), os.environ.get("RANK", "0") == "0"
        if first and not run.has("config.json"):  # under torchrun, the first process may already have made the folder
            run.check_free()


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How image files become the images of a data set."""

    size: str | None = None
    """Size in pixels to which all images are resized: one number for both sides, or height x width, such as 224x160. A
    folder of images of different sizes needs it. For point clouds: the number of points."""
    fit: str | None = field(default=None, metadata={"values": FITS})
    """How images in files are brought to --size; stretch if left out."""
    channels: int | None = None
    """Channels of images in files: 3 (colour; also if left out) or 1 (grey)."""
    cache: Path | None = None
    """Decode image files once into this folder, and read batches from there, which takes little memory. If left out,
    only sets larger than half of the memory are read so, from ~/.cache/shoal/images."""

    def image_settings(self) -> Config:
        """Those of these options that were given, for the configuration. Raises ShoalError for an invalid size."""
        size = None if self.size is None else parse_size(self.size)
        given = {"size": size, "fit": self.fit, "channels": self.channels, CACHE: self.cache}
        return {name: value for name, value in given.items() if value is not None}

    def recorded(self) -> Config:
        """All options for the configuration; image options only if they were given."""
        others = {name: value for name, value in vars(self).items() if name not in (*SIZING, CACHE)}
        return others | self.image_settings()


@dataclass(frozen=True, kw_only=True)
class OutputOption:
    """Which output of the network's forward pass has the logits."""

    output: int | None = None
    """For a network of your own that also returns something other than logits, such as features: the number of the
    output that has the logits, from 0. If left out, all outputs must be logits, from the weakest classifier to the
    strongest."""

    def output_settings(self) -> Config:
        """The option for the configuration, if it was given."""
        return {} if self.output is None else {"output": self.output}


@dataclass(frozen=True)
class NewNetwork(ImageOptions, OutputOption):
    """Options of a training from new weights: the network, its data set and the number of epochs."""

    model: str = field(metadata=ARGUMENT)
    """A built-in network such as resnet18, or package.module:callable that returns an nn.Module."""
    data: str = field()
    """The data set: digits, fashion-mnist, cifar10, cifar100, svhn, tiny-imagenet, modelnet10, modelnet40, or the path
    of a folder of images."""
    data_dir: Path | None = None
    """Folder with the files of the data set, laid out as published. If left out, .data and /usr/share/datasets are
    searched; digits needs none."""
    width: float = 1.0
    """Factor for the number of channels of every layer, such as 0.5. A callable of your own must take it as `width`."""
    resolution: float = 1.0
    """Factor for the height and width of the feature maps: 1, 0.5 or 0.25. A callable of your own must take it as
    `resolution`."""
    preset: str = "quick"
    """Preset of training schedule and loss."""
    epochs: int | None = None
    """Number of epochs; the preset's if left out. Drops of the learning rate move in proportion."""
    schedule: str | None = None
    """Training schedule in place of the preset's, to train by several commands under one setting:
    self-distillation, osakd or osakd-resnet (those of the papers), or epochs=200,lr=0.1,milestones=100/150 and other
    fields of shoal.training.schedule.Schedule, or a name and fields that replace its own."""
    augment: str | None = field(default=None, metadata={"values": (*POLICIES, *CLOUD_POLICIES[1:])})
    """Augmentation of training images; the preset's if left out, or else the data set's."""
    limit: int | None = None
    """Use only this many training images; all if left out."""
    replaced: tuple[str, ...] = field(default=(), metadata={"cli": "--replace"})
    """Replace all layers of a kind before training: OLD=NEW, such as relu6=relu or max_pool=avg_pool (repeatable, or
    separated by commas)."""
    seed: int = 0
    """Seed of initial weights, batches and the validation split."""

    test_every_epoch: bool = field(default=False, metadata={"cli": "--test-every-epoch"})
    """Also evaluate the test set after each epoch, and report the largest and the last test accuracy, as some papers
    do. The network is still that of the best epoch on the validation split."""

    def recorded(self) -> Config:
        """All options for the configuration; those of images and `training_settings` only if they were given."""
        names = ("schedule", "augment", "test_every_epoch", "output")
        others = {k: v for k, v in super().recorded().items() if k not in names}
        return others | self.training_settings() | self.output_settings()

    def training_settings(self) -> Config:
        """Those of --schedule, --augment and --test-every-epoch that were given, for the configuration."""
        given = {"schedule": self.schedule, "augment": self.augment, "test_every_epoch": self.test_every_epoch or None}
        return {name: value for name, value in given.items() if value is not None}

    def scheduled(self, own: Schedule) -> Schedule:
        """The schedule to train by: --schedule, or else `own`, the preset's; of --epochs epochs, if they were given.

        Raises ShoalError for an invalid schedule or number of epochs.
        """
        return longer(own if self.schedule is None else parse_schedule(self.schedule), self.epochs)

    def spec(self, data: Dataset) -> Spec:
        """The network's spec for this data set. Raises ShoalError as `check_network` does."""
        base, folder = located(self.model)
        spec = Spec(
            base, data.classes, data.shape, self.width, self.resolution, replaced=self.replaced, folder=folder,
            output=self.output,
        )  # fmt: skip
        check_network(spec)
        return spec


@dataclass(frozen=True)
class Named(OutputOption):
    """Options that name an untrained network."""

    model: str = field(metadata=ARGUMENT)
    """A built-in network such as resnet18, or package.module:callable that returns an nn.Module."""
    input: str | None = None
    """Input size, channels x height x width. If left out: 3x32x32, or 3x1024x1 for a built-in network for point
    clouds."""
    classes: int = 10
    """Number of classes."""
    width: float = 1.0
    """Factor for the number of channels of every layer, such as 0.5. A callable of your own must take it as `width`."""
    resolution: float = 1.0
    """Factor for the height and width of the feature maps: 1, 0.5 or 0.25. A callable of your own must take it as
    `resolution`."""
    replaced: tuple[str, ...] = field(default=(), metadata={"cli": "--replace"})
    """Replace all layers of a kind first: OLD=NEW, such as relu6=relu or max_pool=avg_pool (repeatable, or separated by
    commas)."""

    def spec(self) -> Spec:
        """The network's spec. Raises ShoalError for an invalid size."""
        shape = input_shape(self.input, self.model)
        base, folder = located(self.model)
        return Spec(
            base, self.classes, shape, self.width, self.resolution, replaced=self.replaced, folder=folder,
            output=self.output,
        )  # fmt: skip


@dataclass(frozen=True)
class Subject(OutputOption):
    """Options that name a run's network, or an untrained network."""

    target: str = field(metadata=ARGUMENT)
    """A run folder of shoal train or reduce, a built-in network such as resnet18, or package.module:callable that
    returns an nn.Module."""
    input: str = "3x32x32"
    """Input size, channels x height x width; a run folder has its own."""
    classes: int = 10
    """Number of classes; a run folder has its own."""
    width: float = 1.0
    """Factor for the number of channels of every layer, such as 0.5. A callable of your own must take it as `width`."""
    resolution: float = 1.0
    """Factor for the height and width of the feature maps: 1, 0.5 or 0.25. A callable of your own must take it as
    `resolution`."""

    @property
    def run(self) -> Run | None:
        """The run, if the target is a folder; otherwise None."""
        return Run(self.target) if Path(self.target).is_dir() else None

    def spec(self) -> Spec:
        """The spec of a network that is not a run's. Raises ShoalError for an invalid size."""
        base, folder = located(self.target)
        shape = parse_shape(self.input)
        return Spec(base, self.classes, shape, self.width, self.resolution, folder=folder, output=self.output)


def check_network(spec: Spec) -> None:
    """Raise ShoalError unless the base network can be built and traced and has a logit for each class.

    Point clouds need a built-in network for point clouds, or the user's own. Image networks would convolve over the
    points in their order, which means nothing.
    """
    if is_cloud(spec.shape) and spec.base in NAMES:
        raise ShoalError(
            f"found {spec.base} for point clouds; need one of {', '.join(CLOUDS)}, or your own; choose one"
        )
    check_logits(own_network(spec), spec)
