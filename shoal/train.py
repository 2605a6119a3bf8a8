"""The only training loop. It knows no method: objectives, hooks and gate ramps are plain callables."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shoal.augment import augment_batch
from shoal.checkpoint import Checkpoint
from shoal.clock import Clock
from shoal.data import Dataset, Split
from shoal.errors import ShoalError
from shoal.optimiser import parameter_groups
from shoal.outputs import Outputs, forward, unwrap

PRECISIONS = ("fp32", "bf16")

ObjectiveLike = Callable[[Outputs, Outputs | None, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Schedule:
    """Epochs and learning rates of one stage.

    `kind` ``step`` multiplies the rate by `gamma` at each of `milestones` (epochs); ``cosine`` anneals to 0 over
    all epochs, batch by batch. `warmup` epochs rise linearly from 0.
    """

    epochs: int
    lr: float = 0.1
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    kind: str = "step"
    warmup: float = 0.0
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False

    def rate(self, epoch: float) -> float:
        """Learning rate at a moment, in (fractional) epochs from 0."""
        rise = min(1.0, epoch / self.warmup) if self.warmup else 1.0
        if self.kind == "cosine":
            return self.lr * rise * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.lr * rise * self.gamma ** sum(epoch >= m for m in self.milestones)

    @property
    def first_drop(self) -> int:
        """The epoch at which the rate falls first: where the gates' ramp ends (half of all for a cosine)."""
        return min(self.milestones) if self.milestones else max(1, self.epochs // 2)


def ramp(epoch: float, until: float, kind: str = "linear") -> float:
    """The gate at `epoch`: from 0 to 1 at `until`, then 1 (shallow section 4). `kind` is linear or cosine."""
    if kind not in ("linear", "cosine"):
        raise ShoalError(f"found ramp {kind!r}; need 'linear' or 'cosine'")
    part = min(1.0, epoch / until) if until > 0 else 1.0
    return part if kind == "linear" else 0.5 * (1 - math.cos(math.pi * part))


def _never() -> bool:
    return False


class Hook(Protocol):
    """What a method may add to the loop. Every part is optional; a mask learner is one.

    `on_epoch_trained` comes before an epoch is judged and perhaps kept as the best, `on_epoch_end` after.
    """

    taps: tuple[str, ...]

    def on_epoch_start(self, model: nn.Module, epoch: int) -> None: ...
    def on_step(self, model: nn.Module, epoch: float) -> None: ...
    def on_batch(self, student: Outputs, teacher: Outputs | None) -> None: ...
    def on_epoch_trained(self, model: nn.Module, epoch: int) -> None: ...
    def on_epoch_end(self, model: nn.Module, epoch: int) -> dict[str, float]: ...


@dataclass
class History:
    """What `fit` did: a row of metrics an epoch, the best validation accuracy, and whether time ran out."""

    rows: list[dict[str, float]] = field(default_factory=list)
    best: float = -1.0
    best_epoch: int = -1
    stopped: bool = False


@dataclass(frozen=True)
class Settings:
    """How to run, not what to learn."""

    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    channels_last: bool = True
    max_seconds: float | None = None
    resume: bool = False
    select: str = "val"
    select_from: int = 0
    """Epochs before this one are never the best: a network whose gates are half open is not a candidate."""
    exit: int | None = -1
    """The classifier whose accuracy chooses the best epoch; None for the mean of all."""
    augment: str | None = None
    stop: Callable[[], bool] = _never
    """Asked before each epoch: whether to stop at the checkpoint of the one before."""

    def __post_init__(self) -> None:
        """Raise ShoalError for a value without a meaning."""
        if self.precision not in PRECISIONS:
            raise ShoalError(f"found precision {self.precision!r}; need one of {', '.join(PRECISIONS)}; choose one")
        if not 0 <= self.seed < 2**32:
            raise ShoalError(f"found seed {self.seed}; need 0 to 2^32 - 1; choose one of them")
        if self.max_seconds is not None and not self.max_seconds >= 0:
            raise ShoalError(f"found a time limit of {self.max_seconds} s; need 0 or more; leave it out for none")

    def check(self) -> None:
        """Raise ShoalError, before any work, when this machine does not have the device."""
        try:
            torch.zeros(1, device=self.device).item()  # `item` turns "meta" away, which holds no numbers
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ShoalError(
                f"found that device {self.device!r} cannot be used ({reason}); need cpu, or cuda where PyTorch finds "
                "a GPU; choose cpu"
            ) from error

    def score(self, accuracy: Sequence[float]) -> float:
        """What an epoch is judged by, from the accuracy of each classifier."""
        return sum(accuracy) / len(accuracy) if self.exit is None else accuracy[self.exit]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision's context: bf16 autocast, or nothing for fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)


def world() -> tuple[int, int]:
    """(rank, number of processes) of this run; (0, 1) outside torchrun."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def join() -> tuple[int, int]:
    """Join the process group that torchrun set up, if it did; returns `world()`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return world()


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Dataset, split: Split, settings: Settings | None = None, batch_size: int = 500
) -> list[float]:
    """Accuracy in percent of every exit of `model`, weak to strong, on `split`."""
    settings = settings or Settings()
    inner = unwrap(model)
    was_training = inner.training
    inner.eval()
    right: Tensor | None = None
    for i in range(0, len(split), batch_size):
        x, y = split.images[i : i + batch_size], split.labels[i : i + batch_size]
        x = _to_device(data.normalise(x.to(settings.device)), settings)
        with settings.autocast():
            logits = _forward(inner, x).logits
        hits = torch.stack([(z.argmax(1) == y.to(z.device)).sum() for z in logits])
        right = hits if right is None else right + hits
    inner.train(was_training)
    if right is None:
        raise ShoalError("found an empty split to evaluate on; need at least one image")
    return [100.0 * float(r) / len(split) for r in right]


def _to_device(x: Tensor, settings: Settings) -> Tensor:
    return x.to(memory_format=torch.channels_last) if settings.channels_last else x


def _forward(model: nn.Module, x: Tensor, taps: Sequence[str] = ()) -> Outputs:
    try:
        return forward(model, x, taps)
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        raise ShoalError(
            f"found a view of channels_last images at {type(unwrap(model)).__name__}; need a reshape, or a network "
            "that `assemble` has traced; write x.flatten(1), or pass Settings(channels_last=False)"
        ) from error


def fit(
    model: nn.Module,
    data: Dataset,
    objective: ObjectiveLike,
    schedule: Schedule,
    *,
    teacher: nn.Module | None = None,
    hooks: Sequence[Any] = (),
    taps: Sequence[str] = (),
    settings: Settings | None = None,
    checkpoint: Checkpoint | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    progress: Callable[[int, int, int], None] | None = None,
    clock: Clock | None = None,
) -> History:
    """Train `model` in place and leave it with the weights of its best epoch on the validation split.

    After every epoch the weights, optimiser state and metrics go to `checkpoint` atomically; with
    ``settings.resume`` training goes on from there, bit for bit as if it had never stopped (on CPU). `report` gets
    each epoch's row, `progress` (epoch, step, steps). `clock` counts the time of several fits instead of
    ``settings.max_seconds``. Raises ShoalError when the loss is not finite; the last good checkpoint stays.
    """
    settings = settings or Settings()
    settings.check()
    clock = clock or Clock(settings.max_seconds)
    loop = _Loop(model, data, objective, schedule, teacher, hooks, tuple(taps), settings, checkpoint, clock)
    return loop.run(report or (lambda row: None), progress or (lambda epoch, step, steps: None))


class _Loop:
    """The state of one `fit`; `run` reads top to bottom."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        objective: ObjectiveLike,
        schedule: Schedule,
        teacher: nn.Module | None,
        hooks: Sequence[Any],
        taps: tuple[str, ...],
        settings: Settings,
        checkpoint: Checkpoint | None,
        clock: Clock,
    ) -> None:
        self.data, self.objective, self.schedule, self.settings = data, objective, schedule, settings
        self.hooks, self.checkpoint, self.clock = hooks, checkpoint, clock
        self.rank, self.size = world()
        self.inner = model.to(settings.device)
        if settings.channels_last:
            self.inner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parallel = self.size > 1
        self.model = nn.parallel.DistributedDataParallel(self.inner) if parallel else self.inner
        self.teacher = teacher.to(settings.device).eval() if teacher is not None else None
        if self.teacher is not None and settings.channels_last:
            self.teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        wanted = [*taps, *getattr(objective, "taps", ()), *(t for h in hooks for t in getattr(h, "taps", ()))]
        self.taps = tuple(dict.fromkeys(wanted))
        self.own = tuple(dict.fromkeys((*self.taps, *getattr(objective, "own", ()))))
        self.optimiser = torch.optim.SGD(
            parameter_groups(self.inner, schedule.weight_decay),
            schedule.lr,
            schedule.momentum,
            nesterov=schedule.nesterov,
        )
        self.history = History()

    def run(self, report: Callable[[dict[str, float]], None], progress: Callable[[int, int, int], None]) -> History:
        start = self._resume()
        for epoch in range(start, self.schedule.epochs):
            if self._out_of_time():
                self.history.stopped = True
                break
            moment = time.monotonic()
            row = self._epoch(epoch, progress)
            self.clock.lap(time.monotonic() - moment)
            self.history.rows.append(row)
            if self.rank == 0:
                report(row)
        if not self.history.stopped:
            self._restore_best()
        return self.history

    def _out_of_time(self) -> bool:
        over = self.clock.is_up or self.settings.stop()
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

    def _epoch(self, epoch: int, progress: Callable[[int, int, int], None]) -> dict[str, float]:
        moment = time.monotonic()
        torch.manual_seed(self.settings.seed * 1_000_003 + epoch)
        self._call("on_epoch_start", self.inner, epoch)
        self.model.train()
        parts = self._train(epoch, progress)
        self._call("on_epoch_trained", self.inner, epoch)
        accuracy = evaluate(self.model, self.data, self._judge(), self.settings)
        row = {"epoch": epoch, "lr": self.schedule.rate(epoch), "accuracy": accuracy[-1], **parts}
        row |= {f"accuracy_exit{i}": a for i, a in enumerate(accuracy[:-1])}
        if epoch >= self.settings.select_from:
            self._keep_best(epoch, self.settings.score(accuracy))
        row |= self._call("on_epoch_end", self.inner, epoch)
        row["seconds"] = time.monotonic() - moment
        if self.checkpoint is not None and self.rank == 0:
            h = self.history
            done = {"epoch": epoch, "rows": [*h.rows, row], "best": h.best, "best_epoch": h.best_epoch}
            self.checkpoint.save_last(self.inner, self.optimiser, self.hooks, done)
        return row

    def _judge(self) -> Split:
        split = getattr(self.data, self.settings.select)
        return split if len(split) else self.data.train

    def _train(self, epoch: int, progress: Callable[[int, int, int], None]) -> dict[str, float]:
        totals: dict[str, Tensor] = {}
        steps = max(1, len(self.data.train) // self.schedule.batch_size)
        for step, (x, y) in enumerate(self._batches(epoch)):
            for group in self.optimiser.param_groups:
                group["lr"] = self.schedule.rate(epoch + step / steps) * group["multiplier"]
            self._call("on_step", self.inner, epoch + step / steps)
            for name, value in self._step(x, y).items():
                totals[name] = totals[name] + value if name in totals else value
            progress(epoch, step, steps)
        means = {name: float(total) / (step + 1) for name, total in totals.items()}
        self._check_finite(means, epoch)
        return means

    def _step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        taught = None
        with self.settings.autocast():
            if self.teacher is not None:
                with torch.no_grad():
                    taught = _forward(self.teacher, x, self.taps)
            student = _forward(self.model, x, self.own)
        loss, parts = self.objective(student, taught, y)
        self._call("on_batch", student, taught)
        del student, taught  # taps that no gradient needs would lie in memory through the backward pass
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return {"loss": loss.detach(), **parts}

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        seed = self.settings.seed * 1_000_003 + epoch
        split, size = self.data.train, self.schedule.batch_size
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator(split.images.device).manual_seed(seed * self.size + self.rank)
        policy = self.settings.augment or self.data.augment
        for i in range(0, max(1, len(split) // size)):
            mine = order[i * size : (i + 1) * size][self.rank :: self.size].to(split.images.device)
            x = augment_batch(split.images[mine], policy, generator).to(self.settings.device)
            y = split.labels[mine].to(self.settings.device)
            yield _to_device(self.data.normalise(x), self.settings), y

    def _check_finite(self, means: dict[str, float], epoch: int) -> None:
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            kept = f"; the checkpoint of epoch {epoch - 1} is kept" if self.checkpoint and epoch else ""
            raise ShoalError(
                f"found {bad[0]} = {means[bad[0]]} in epoch {epoch}; need a finite loss; lower the rate{kept}"
            )

    def _keep_best(self, epoch: int, score: float) -> None:
        if score > self.history.best:
            self.history.best, self.history.best_epoch = score, epoch
            state = {k: v.detach().cpu().clone() for k, v in self.inner.state_dict().items()}
            self._best = state
            if self.checkpoint is not None and self.rank == 0:
                self.checkpoint.save_best(state)

    def _restore_best(self) -> None:
        state = getattr(self, "_best", None)
        if state is None and self.checkpoint is not None and self.checkpoint.has_best:
            state = self.checkpoint.load_best()
        if state is not None:
            self.inner.load_state_dict(state)

    def _resume(self) -> int:
        if not (self.settings.resume and self.checkpoint is not None and self.checkpoint.has_last):
            return 0
        done = self.checkpoint.load_last(self.inner, self.optimiser, self.hooks)
        self.history = History(done["rows"], done["best"], done["best_epoch"])
        return int(done["epoch"]) + 1
