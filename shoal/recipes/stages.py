"""What the training stages of a recipe share (data, settings, clock and run folder), and the teacher's training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shoal.data.dataset import Dataset
from shoal.errors import ShoalError, StoppedError
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.storage.run import Run
from shoal.surgery.tracing import check_trace
from shoal.training.clock import Clock
from shoal.training.loop import History, fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings

Listener = Callable[[str, int, int, int], None]
"""Called with (stage, epoch, step, steps). If it has a method `judged`, that gets (stage, row) after each epoch."""


class _Relabelled:
    """A listener that hears of all stages as `label`."""

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

    With `run`, stages write checkpoints and logs there, and `settings.resume` goes on from them. `listen` is called
    after each step; `tensorboard` also writes events. `clock` counts from now unless it is given.
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
        self.data, self.settings, self.run, self.listen = data, settings, run, listen
        self.tensorboard, self.clock = tensorboard, clock or Clock(settings.max_seconds)
        self.histories: dict[str, History] = {}

    def at(self, run: Run, label: str) -> Stages:
        """The same with another run folder and the same clock; `listen` is called with `label` for its stages."""
        heard = _Relabelled(self.listen, label) if self.listen else None
        return Stages(self.data, self.settings, run, heard, self.tensorboard, self.clock)

    def changed(self, **settings: Any) -> Stages:
        """The same with some of its settings changed, the same clock, and no stage finished yet."""
        own = replace(self.settings, **settings)
        return Stages(self.data, own, self.run, self.listen, self.tensorboard, self.clock)

    @property
    def folder(self) -> Run:
        """The run folder. Raises ShoalError when there is none."""
        if self.run is None:
            raise ShoalError("found no run folder; need one for these stages; give Stages a run (Stages.run)")
        return self.run

    def fit(self, stage: str, model: nn.Module, objective: Objective, schedule: Schedule, **more: Any) -> History:
        """`fit` one stage with its checkpoint, log and progress; a finished stage is loaded, not repeated.

        Raises StoppedError when the time is up.
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
        """What `fit` calls with each epoch's row: the run's log, and whoever listens."""
        record = self.run.recorder(stage, self.tensorboard) if self.run else None

        def report(row: dict[str, float]) -> None:
            if record is not None:
                record(row)
            _tell(self.listen, stage, row)

        return report

    def some_batches(self, most: int = 10_000, batch: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised training images with labels in batches, evenly spread over the set."""
        split, device = self.data.train, self.settings.device
        chosen = torch.linspace(0, len(split) - 1, min(most, len(split))).long().to(split.images.device).split(batch)
        return ((self.data.normalise(split.images[c].to(device)), split.labels[c].to(device)) for c in chosen)


def train_teacher(
    spec: Spec, schedule: Schedule, stages: Stages, base: nn.Module | None = None
) -> tuple[nn.Module, History]:
    """Train the all-ReLU network of `spec`, or of `base`, by cross-entropy, and return it with its history.

    Raises ShoalError when `base` does not compute the same after tracing, and StoppedError when the time is up.
    """
    if base is not None:
        check_trace(base, spec.shape)
    torch.manual_seed(stages.settings.seed)
    model = assemble(spec, base)
    history = stages.fit("teacher", model, Objective((cross_entropy(),)), schedule)
    return model, history


def check_teacher(spec: Spec) -> None:
    """Raise ShoalError unless `spec` is that of an all-ReLU network, on which no surgery has been done."""
    if spec.is_reduced:
        raise ShoalError(
            "found a network that has been reduced already, or given exits; need the all-ReLU network that it came "
            "from; begin with that one"
        )


def fresh(model: nn.Module) -> nn.Module:
    """A copy of `model` with its parameters drawn again by each layer's own rule."""
    drawn = copy.deepcopy(model).train()
    for module in drawn.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    return drawn
