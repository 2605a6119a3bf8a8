"""The training loop. It is independent of any method: objectives, hooks and gate ramps are plain callables."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shoal.data.dataset import Dataset, Split
from shoal.errors import ShoalError
from shoal.outputs import Outputs
from shoal.storage.checkpoint import Checkpoint
from shoal.training.batches import Batches
from shoal.training.clock import Clock
from shoal.training.evaluation import evaluate
from shoal.training.history import History
from shoal.training.memory_format import suit
from shoal.training.on_test import row_of_tests
from shoal.training.optimiser import sgd
from shoal.training.schedule import Schedule, ramp
from shoal.training.settings import PRECISIONS, Settings
from shoal.training.stepping import (
    ObjectiveLike,
    Recorded,
    Work,
    explain_layout,
    explain_single,
    is_steady,
    make_step,
)

__all__ = [
    "PRECISIONS", "Clock", "History", "Hook", "ObjectiveLike", "Schedule", "Settings", "evaluate", "fit", "join",
    "ramp", "world",
]  # fmt: skip

PACE = 32
"""With a time limit, number of steps after which the loop waits for the GPU."""
MIDWAY = 600.0
"""Seconds without a checkpoint after which one is written in the middle of an epoch."""


class Hook(Protocol):
    """Callbacks by which a method extends the loop. All members are optional. A mask learner is a hook.

    `on_step` runs before each step. It returns true if the step's computation changes, beyond the values of its
    tensors. `on_batch` receives the outputs of both networks. `on_stepped` runs after the update, while gradients are
    still there. With `recordable`, the Python code of `on_batch` may run once for many steps (see
    `shoal.training.stepping`), and the methods for epochs may change only values of tensors.

    `on_epoch_trained` runs before an epoch is evaluated, `on_epoch_end` after. `state` and `load` serve checkpoints,
    which may lie within an epoch; `on_epoch_start` then runs before `load`.
    """

    taps: tuple[str, ...]
    recordable: bool

    def on_epoch_start(self, model: nn.Module, epoch: int) -> None: ...
    def on_step(self, model: nn.Module, epoch: float) -> bool | None: ...
    def on_batch(self, student: Outputs, teacher: Outputs | None) -> None: ...
    def on_stepped(self, model: nn.Module) -> None: ...
    def on_epoch_trained(self, model: nn.Module, epoch: int) -> None: ...
    def on_epoch_end(self, model: nn.Module, epoch: int) -> dict[str, float]: ...


def world() -> tuple[int, int]:
    """(rank, number of processes) of this run; (0, 1) outside torchrun."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def join() -> tuple[int, int]:
    """Join the process group that torchrun set up, if any; returns `world()`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return world()


def fit(
    model: nn.Module,
    data: Dataset,
    objective: ObjectiveLike,
    schedule: Schedule,
    *,
    teacher: nn.Module | None = None,
    hooks: Sequence[Any] = (),
    settings: Settings | None = None,
    checkpoint: Checkpoint | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    progress: Callable[[int, int, int], None] | None = None,
    clock: Clock | None = None,
) -> History:
    """Train `model` in place and leave it with the weights of its best epoch on the validation split.

    `checkpoint` receives the weights, optimiser state and metrics after every epoch (at most every
    ``settings.save_seconds``), and when training stops, even within an epoch. Files are written atomically. With
    ``settings.resume``, training continues from there, bit for bit as if it had never stopped (on the same kind of
    device; docs/gpu.md names what CUDA does not repeat).

    `report` is called with the row of each epoch, `progress` with (epoch, step, steps). `clock` is a time limit shared
    by several fits, instead of ``settings.max_seconds``. Raises ShoalError when the loss is not finite; the last good
    checkpoint stays.
    """
    settings = settings or Settings()
    settings.check()
    clock = clock or Clock(settings.max_seconds)
    loop = _Loop(model, data, objective, schedule, _Around(teacher, hooks, settings, checkpoint, clock))
    try:
        with settings.exact():
            return loop.run(report or (lambda row: None), progress or (lambda epoch, step, steps: None))
    finally:
        loop.work.close()


@dataclass(frozen=True)
class _Around:
    """The arguments of `fit` other than the network, its data, the objective and the schedule."""

    teacher: nn.Module | None
    hooks: Sequence[Any]
    settings: Settings
    checkpoint: Checkpoint | None
    clock: Clock


class _Loop:
    """The state of one `fit`. `run` is the entry point."""

    def __init__(
        self, model: nn.Module, data: Dataset, objective: ObjectiveLike, schedule: Schedule, around: _Around
    ) -> None:
        settings, hooks = suit(around.settings, model), around.hooks
        self.data, self.objective, self.schedule, self.settings = data, objective, schedule, settings
        self.hooks, self.checkpoint, self.clock = hooks, around.checkpoint, around.clock
        self.rank, self.size = world()
        self.inner = self._place(model)
        self.model = nn.parallel.DistributedDataParallel(self.inner) if self.size > 1 else self.inner
        known = self._place(around.teacher).eval() if around.teacher is not None else None
        self.optimiser = sgd(self.inner, schedule, settings.device)
        self.work = Work(self.model, known, objective, hooks, self.optimiser, settings)
        self.step = make_step(self.work)
        self.batches = Batches(data, settings, schedule.batch_size, (self.rank, self.size))
        self.history, self.best, self.is_new = History(exit=settings.exit), dict[str, Tensor](), False
        self.spent, self.saved, self.position = 0.0, time.monotonic(), (0, 0)

    def _place(self, network: nn.Module) -> nn.Module:
        # A stage before may have left the network in the other format, and convolutions follow that of their weights.
        layout = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        network.to(self.settings.device)
        network.to(memory_format=layout)  # type: ignore[call-overload]
        return network

    def run(self, report: Callable[[dict[str, float]], None], progress: Callable[[int, int, int], None]) -> History:
        epoch, step = self._resume()
        while epoch < self.schedule.epochs:
            row = self._epoch(epoch, step, progress)
            if row is None:
                self.history.stopped = True
                return self.history
            if self.rank == 0:
                report(row)
            epoch, step = epoch + 1, 0
        self._restore_best()
        return self.history

    def _epoch(self, epoch: int, first: int, progress: Callable[[int, int, int], None]) -> dict[str, float] | None:
        """Run an epoch from step `first` on; returns its row, or None if it stopped at a checkpoint."""
        moment, steps = time.monotonic(), self.batches.steps
        if first == 0:
            if self._must_stop("epoch" if self.size > 1 else "step"):
                self._pause(epoch, 0, moment)
                return None
            self._begin(epoch)
        self.model.train()
        batches = self.batches.draw(first)
        for step in range(first, steps):
            if self.size == 1 and self._must_stop("step"):
                self._pause(epoch, step, moment)
                return None
            self._train(epoch, step / steps, *next(batches))
            progress(epoch, step, steps)
            self._keep_pace(step)
            if self.size == 1 and time.monotonic() - self.saved > max(MIDWAY, self.settings.save_seconds):
                self._save(epoch, step + 1, moment)
        if self.size == 1 and self._must_stop("judgement"):
            self._pause(epoch, steps, moment)
            return None
        return self._judge(epoch, moment)

    def _begin(self, epoch: int) -> None:
        self.batches.begin(epoch)
        self._call("on_epoch_start", self.inner, epoch)
        self.work.begin({})
        if not all(is_steady(hook) for hook in (self.objective, *self.hooks)):
            self._forget()

    def _forget(self) -> None:
        if isinstance(self.step, Recorded):
            self.step.forget()

    def _must_stop(self, kind: str) -> bool:
        over = not self.clock.has_time_for(kind) or self.settings.stop()
        if self.size == 1:
            return over
        flag = torch.tensor(float(over), device=self.settings.device)
        torch.distributed.broadcast(flag, 0)
        return bool(flag)

    def _call(self, name: str, *args: Any) -> dict[str, float]:
        row: dict[str, float] = {}
        for hook in (self.objective, *self.hooks):
            if hasattr(hook, name):
                row |= getattr(hook, name)(*args) or {}
        return row

    def _train(self, epoch: int, part: float, x: Tensor, y: Tensor) -> None:
        moment, ready = time.monotonic(), self.step.is_ready
        for group in self.optimiser.param_groups:
            group["lr"].fill_(self.schedule.rate(epoch + part) * group["multiplier"])
        for hook in self.hooks:
            if hasattr(hook, "on_step") and hook.on_step(self.inner, epoch + part):
                self._forget()
        try:
            self.step(x, y)
        except RuntimeError as error:
            raise explain_layout(error, self.inner) from error
        except ValueError as error:
            raise explain_single(error) from error
        self._call("on_stepped", self.inner)
        if ready:  # steps that compile or record take longer than later ones
            self.clock.lap("step", time.monotonic() - moment)

    def _keep_pace(self, step: int) -> None:
        """Wait for the device every few steps if there is a time limit: it may lag behind by many steps."""
        if self.clock.limit is not None and step % PACE == PACE - 1 and self.settings.device.startswith("cuda"):
            torch.cuda.synchronize()

    def _judge(self, epoch: int, moment: float) -> dict[str, float]:
        """Evaluate a trained epoch, keep its row, and save a checkpoint if one is due; returns the row."""
        begun = time.monotonic()
        self.batches.end()
        parts = {name: float(total) / self.batches.steps for name, total in self.work.sums.items()}
        self._check_finite(parts, epoch)
        self._call("on_epoch_trained", self.inner, epoch)
        accuracy = evaluate(self.model, self.data, self._split(), self.settings)
        more = self._tested(accuracy)
        self.work.student.caught.clear()  # else the taps of the last evaluated batch stay in memory until the next step
        row = {"epoch": epoch, "lr": self.schedule.rate(epoch), "accuracy": accuracy[-1], **parts}
        row |= {f"accuracy_exit{i}": a for i, a in enumerate(accuracy[:-1])} | more
        if epoch >= self.settings.select_from:
            self._keep_best(epoch, self.settings.score(accuracy))
        row |= self._call("on_epoch_end", self.inner, epoch)
        now = time.monotonic()
        row["seconds"] = self.spent + now - moment
        self.spent = 0.0
        self.history.rows.append(row)
        self.clock.lap("judgement", now - begun)
        self.clock.lap("epoch", now - moment)
        if epoch == self.schedule.epochs - 1 or now - self.saved >= self.settings.save_seconds:
            self._save(epoch + 1, 0, now)
        return row

    def _tested(self, accuracy: list[float]) -> dict[str, float]:
        """The test accuracies of the epoch, if wanted; `accuracy` is that on the split that selects the epoch."""
        if not self.settings.test_every_epoch:
            return {}
        if self._split() is not self.data.test:
            accuracy = evaluate(self.model, self.data, self.data.test, self.settings)
        return row_of_tests(accuracy)

    def _split(self) -> Split:
        split = getattr(self.data, self.settings.select)
        return split if len(split) else self.data.train

    def _check_finite(self, means: dict[str, float], epoch: int) -> None:
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            last = self.position[0] - 1
            kept = f"; the checkpoint of epoch {last} is kept" if self.checkpoint and last >= 0 else ""
            raise ShoalError(
                f"found {bad[0]} = {means[bad[0]]} in epoch {epoch}; need a finite loss; lower the rate{kept}"
            )

    def _keep_best(self, epoch: int, score: float) -> None:
        if score > self.history.best:
            self.history.best, self.history.best_epoch = score, epoch
            self.best = {k: v.detach().clone() for k, v in self.inner.state_dict().items()}
            self.is_new = True

    def _restore_best(self) -> None:
        if not self.best and self.checkpoint is not None and self.checkpoint.has_best:
            self.best = self.checkpoint.load_best()
        if self.best:
            self.inner.load_state_dict(self.best)

    def _pause(self, epoch: int, step: int, moment: float) -> None:
        """Save a checkpoint, unless there is one: `step` steps of `epoch` are done."""
        if (epoch, step) != self.position:
            self._save(epoch, step, moment)

    def _save(self, epoch: int, step: int, moment: float) -> None:
        """Write all that is needed to resume. `moment` is the start of the seconds that no row counts yet."""
        begun = time.monotonic()
        if self.checkpoint is not None and self.rank == 0:
            sums = {name: float(total) for name, total in self.work.sums.items()} if step else {}
            self._check_finite(sums, epoch)
            if self.is_new:
                self.checkpoint.save_best(self.best)
                self.is_new = False
            h = self.history
            done = {"epoch": epoch - 1, "rows": h.rows, "best": h.best, "best_epoch": h.best_epoch}
            if step:
                done |= {"step": step, "sums": sums, "seconds": self.spent + begun - moment}
            self.checkpoint.save_last(self.inner, self.optimiser, (*self.hooks, self.batches), done)
        self.position, self.saved = (epoch, step), time.monotonic()
        self.clock.lap("save", self.saved - begun)

    def _resume(self) -> tuple[int, int]:
        """The epoch and the step to continue with."""
        if not (self.settings.resume and self.checkpoint is not None and self.checkpoint.has_last):
            return 0, 0
        last = self.checkpoint.read_last()
        done = last.progress
        epoch, step = int(done["epoch"]) + 1, int(done.get("step", 0))
        if step:
            self._begin(epoch)
        last.restore(self.inner, self.optimiser, (*self.hooks, self.batches))
        self.work.begin(done.get("sums", {}))
        self.history = History(done["rows"], done["best"], done["best_epoch"], exit=self.settings.exit)
        self.spent, self.position = done.get("seconds", 0.0), (epoch, step)
        return epoch, step
