"""What jobs are given: options of all that train, data of a run, shapes, teachers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
from shoal.storage.origins import placed
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


@dataclass(frozen=True)
class Shared:
    """Options that all training commands have."""

    out: Path
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    max_seconds: float | None = None
    resume: bool = False
    tensorboard: bool = False
    stop: Callable[[], bool] = lambda: False
    """Asked before each step: whether to stop at a checkpoint."""
    begun: float = field(default_factory=time.monotonic)
    """When the command began: what it has done before training counts, too."""
    shard_mb: float | None = None
    """Most MB (of 10^6 bytes) of a file of weights; None for one file, however large."""
    step: str = "eager"
    save_seconds: float = 0.0

    @property
    def shard_bytes(self) -> int | None:
        """The limit in bytes. Raises ShoalError for one that is too small."""
        if self.shard_mb is None:
            return None
        check_limit(1e6 * self.shard_mb)
        return int(1e6 * self.shard_mb)

    def recorded(self, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration with what of these options decides the result: the precision, where it is not fp32."""
        return config | ({"precision": self.precision} if self.precision != "fp32" else {})

    def run(self, config: dict[str, Any]) -> Run:
        """The run at `out`, begun or gone on with in the same precision. Raises ShoalError as `Run.create` does."""
        return Run.create(self.out, self.recorded(config), self.resume, self.shard_bytes)

    def settings(self, seed: int | None = None) -> Settings:
        """The loop's settings from now on."""
        chosen, limit = self.seed if seed is None else seed, self.max_seconds
        if limit is not None and limit > 0:
            limit = max(0.0, limit - (time.monotonic() - self.begun))
        return Settings(
            chosen, self.device, self.precision, max_seconds=limit, resume=self.resume, stop=self.stop, step=self.step,
            save_seconds=self.save_seconds,
        )  # fmt: skip

    def check(self) -> None:
        """Raise ShoalError for what cannot be had on this machine, and for a place that is no run's."""
        self.settings().check()
        _ = self.shard_bytes  # raises
        if self.tensorboard:
            summary_writer()
        run, first = Run(self.out), os.environ.get("RANK", "0") == "0"
        if first and not run.has("config.json"):  # the other processes of torchrun may find what the first has made
            run.check_free()


def load_data(config: dict[str, Any], data_dir: Path | None, device: str = "cpu") -> Dataset:
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


def teacher_of(folder: Path, shared: Shared) -> tuple[Spec, nn.Module, dict[str, Any]]:
    """A teacher's spec, network and configuration, to be reduced. Raises ShoalError where a reduction cannot begin."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ShoalError("found reduce under torchrun; need one process; use torchrun for shoal train")
    shared.check()
    source = Run(folder)
    spec, network = load_network(source)
    check_teacher(spec)
    return spec, network, source.config()


def given_sensitivity(path: Path | None) -> dict[str, float] | None:
    """The sensitivities in a JSON file. Raises ShoalError unless they are numbers by name."""
    if path is None:
        return None
    body = read_json(path)
    numbers = isinstance(body, dict) and all(isinstance(v, (int, float)) for v in body.values())
    if not body or not numbers:
        raise ShoalError(f"found no sensitivities at {path}; need JSON with a number for each site; mend the file")
    return dict(body)
