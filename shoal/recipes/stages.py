"""What the training stages of a recipe share (data, settings, clock, run folder), and the training of a teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shoal.data.dataset import Dataset, check_kind
from shoal.errors import ShoalError, StoppedError
from shoal.networks.adoption import check_logits
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.storage.run import Run
from shoal.training.clock import Clock
from shoal.training.loop import History, fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings

Listener = Callable[[str, int, int, int], None]
"""Called with (stage, epoch, step, steps). Its method `judged`, if it has one, is called after each epoch with
(stage, row)."""


class _Relabelled:
    """Calls `listen` with `label` in place of the stage's name."""

    def __init__(self, listen: Listener, label: str) -> None:
        self.listen, self.label = listen, label

    def __call__(self, stage: str, epoch: int, step: int, steps: int) -> None:
        self.listen(self.label, epoch, step, steps)

    def judged(self, stage: str, row: dict[str, float]) -> None:
        _tell(self.listen, self.label, row)


def _tell(listen: Listener | None, stage: str, row: dict[str, float]) -> None:
    if listen is not None and hasattr(listen, "judged"):
        listen.judged(stage, row)


class Stages:
    """What all training stages of one recipe share: data, settings, clock and, optionally, a run folder.

    With `run`, stages write checkpoints and logs there, and `settings.resume` continues from the last checkpoint.
    `listen` is called after each step; with `tensorboard`, TensorBoard events are written as well. Without `clock`, the
    time limit counts from now.
    """

    def __init__(
        self,
        data: Dataset,
        settings: Settings,
        run: Run | None = None,
        listen: Listener | None = None,
        tensorboard: bool = False,
        clock: Clock | None = None,
    ) -> None:
        _check_kinds(data, settings)
        self.data, self.settings, self.run, self.listen = data, settings, run, listen
        self.tensorboard, self.clock = tensorboard, clock or Clock(settings.max_seconds)
        self.histories: dict[str, History] = {}

    def at(self, run: Run, label: str) -> Stages:
        """The same with the run folder `run`, and with `label` as the name of its stages in calls of `listen`."""
        heard = _Relabelled(self.listen, label) if self.listen else None
        return Stages(self.data, self.settings, run, heard, self.tensorboard, self.clock)

    def changed(self, **settings: Any) -> Stages:
        """The same with some settings changed and no histories yet; the clock stays the same."""
        own = replace(self.settings, **settings)
        return Stages(self.data, own, self.run, self.listen, self.tensorboard, self.clock)

    @property
    def folder(self) -> Run:
        """The run folder. Raises ShoalError when there is none."""
        if self.run is None:
            raise ShoalError("found no run folder; need one for these stages; give Stages a run (Stages.run)")
        return self.run

    def fit(self, stage: str, model: nn.Module, objective: Objective, schedule: Schedule, **more: Any) -> History:
        """Run `training.fit` for one stage, with a checkpoint, a log and progress; a finished stage is only loaded.

        `more` are further arguments of that function; `settings` among them is a dict of settings to change. Raises
        StoppedError when the time is up.
        """
        settings = replace(self.settings, **more.pop("settings", {}))
        run, listen = self.run, self.listen
        history = fit(
            model,
            self.data,
            objective,
            schedule,
            settings=settings,
            checkpoint=run.checkpoint(stage) if run else None,
            report=self._report(stage),
            progress=(lambda e, s, n: listen(stage, e, s, n)) if listen else None,
            clock=self.clock,
            **more,
        )
        self.histories[stage] = history
        if history.stopped:
            raise StoppedError(
                f"found that the time is up in stage {stage!r}; its checkpoint keeps what was done; need more time; "
                "run again with --resume (Settings.resume)"
            )
        return history

    def _report(self, stage: str) -> Callable[[dict[str, float]], None]:
        """The function that `fit` calls with each epoch's row; it writes the log and calls the listener."""
        record = self.run.recorder(stage, self.tensorboard) if self.run else None

        def report(row: dict[str, float]) -> None:
            if record is not None:
                record(row)
            _tell(self.listen, stage, row)

        return report

    def some_batches(self, most: int = 10_000, batch: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """At most `most` training images, evenly spread over the set, in batches with labels.

        Images are normalised float32 [N, C, H, W], labels int64 [N], with N at most `batch`.
        """
        split, device = self.data.train, self.settings.device
        chosen = torch.linspace(0, len(split) - 1, min(most, len(split))).long().to(split.images.device).split(batch)
        return ((self.data.normalise(split.images[c].to(device)), split.labels[c].to(device)) for c in chosen)


def _check_kinds(data: Any, settings: Any) -> None:
    """Raise ShoalError for something else than a data set and settings, which is how most first programs go wrong."""
    check_kind(data)
    if not isinstance(settings, Settings):
        raise ShoalError(f"found a {type(settings).__name__} as settings; need shoal.Settings(...); pass one")


def train_teacher(
    spec: Spec, schedule: Schedule, stages: Stages, base: nn.Module | None = None
) -> tuple[nn.Module, History]:
    """Train the all-ReLU network of `spec`, or `base`, by cross-entropy; returns the network and its history.

    Raises ShoalError when `base` computes something else after tracing or has another number of logits than
    `spec.classes`, and StoppedError when the time is up.
    """
    if base is not None:
        check_logits(base, spec)
    torch.manual_seed(stages.settings.seed)
    model = assemble(spec, base)
    history = stages.fit("teacher", model, Objective((cross_entropy(),)), schedule)
    return model, history


def check_teacher(spec: Spec) -> None:
    """Raise ShoalError unless `spec` describes an all-ReLU network: not reduced, no exits added."""
    if spec.is_reduced:
        raise ShoalError(
            "found a network that has been reduced already, or given exits; need the all-ReLU network that it came "
            "from; begin with that one"
        )


def fresh(model: nn.Module) -> nn.Module:
    """A copy of `model`, in training mode, with new random parameters from each layer's `reset_parameters`."""
    drawn = copy.deepcopy(model).train()
    for module in drawn.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    return drawn
