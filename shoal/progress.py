"""Progress on standard error, so that it does not mix with `--json` output: bars on a terminal, lines elsewhere.

It shows steps that were started, and the figures at the end of each epoch, all known on the host. It never reads a
tensor, so it never waits for the device.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from shoal.units import duration, percent, seconds, significant

QUIET, NORMAL, VERBOSE = -1, 0, 1

EVERY = 60.0
"""Seconds between two lines of a counter where there is no terminal."""

verbosity: ContextVar[int] = ContextVar("verbosity", default=NORMAL)
"""How much is shown: -1 nothing; 0 bars and lines; 1 or more, in addition to bars, a line for each epoch and status."""


def set_verbosity(level: int) -> None:
    """Set how much is shown: -1 quiet, 0 normal, 1 or more verbose, which also shows the log on standard error."""
    verbosity.set(level)
    if level >= VERBOSE:
        logging.basicConfig()
        logging.getLogger().setLevel(logging.DEBUG if level > VERBOSE else logging.INFO)


def is_quiet() -> bool:
    """Whether nothing is shown: chosen by the user, or because this is not the first process of torchrun."""
    return verbosity.get() <= QUIET or os.environ.get("RANK", "0") != "0"


def say(text: str) -> None:
    """Print a line on standard error, unless quiet."""
    if not is_quiet():
        _line(Console(stderr=True), text)


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class StageBars:
    """A bar for each training stage, with epoch, loss, validation accuracy and time left. Recipes call `listen`.

    Without a terminal, each epoch is a line instead. `progress` is None if no bars are drawn, and `console` is None if
    nothing is shown. `epochs` has the number of epochs by stage; any other stage has `other` epochs.
    """

    def __init__(
        self, console: Console | None, progress: Progress | None, epochs: Mapping[str, int], other: int = 1
    ) -> None:
        self.console, self.progress, self.epochs, self.other = console, progress, epochs, other
        self.tasks: dict[str, Any] = {}
        self.begun: dict[str, tuple[int, float]] = {}

    @property
    def listen(self) -> StageBars:
        """The listener for recipes: they call it with (stage, epoch, step, steps), and `judged` after each epoch."""
        return self

    def __call__(self, stage: str, epoch: int, step: int, steps: int) -> None:
        """Move the bar of `stage` to batch `step` of `steps` in `epoch`; `step` and `epoch` count from 0."""
        self.begun.setdefault(stage, (epoch, time.monotonic()))
        if self.progress is None:
            return
        done, total = epoch * steps + step + 1, self._total(stage)
        if stage not in self.tasks:  # steps before a resume do not count for the speed
            self.tasks[stage] = self.progress.add_task(
                stage, total=total * steps, completed=done - 1, epoch=f"{epoch + 1}/{total}", figures=""
            )
        self.progress.update(self.tasks[stage], completed=done, epoch=f"{min(epoch + 1, total)}/{total}")

    def judged(self, stage: str, row: Mapping[str, float]) -> None:
        """Show the figures at the end of an epoch of `stage`: `epoch` (from 0), `loss`, `accuracy` (in percent)."""
        if self.progress is not None and stage in self.tasks:
            self.progress.update(self.tasks[stage], figures=_figures(row, "accuracy"))
        if self.console is not None and (self.progress is None or verbosity.get() >= VERBOSE):
            _line(self.console, self._line_of(stage, row))

    def _line_of(self, stage: str, row: Mapping[str, float]) -> str:
        epoch, total = int(row["epoch"]) + 1, self._total(stage)
        first, begun = self.begun.get(stage, (epoch - 1, time.monotonic()))
        left = (time.monotonic() - begun) / max(1, epoch - first) * max(0, total - epoch)
        parts = [_figures(row, "validation accuracy"), f"{seconds(row['seconds'])} s" if "seconds" in row else ""]
        parts += [f"about {duration(left)} left in this stage" if left else ""]
        return f"{stage}: epoch {epoch} of {total}, " + ", ".join(filter(None, parts))

    def _total(self, stage: str) -> int:
        return self.epochs.get(stage, self.other)


def _figures(row: Mapping[str, float], accuracy: str) -> str:
    loss = f"loss {significant(row['loss'])}, " if "loss" in row else ""
    return f"{loss}{accuracy} {percent(row['accuracy'])} %"


def _stage_columns() -> tuple[Any, ...]:
    """Columns that fit into 80 characters; on a narrower terminal the bar shrinks first."""
    return (
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[epoch]}"),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )


@contextmanager
def bars(epochs: Mapping[str, int], other: int = 1) -> Iterator[StageBars]:
    """Yield progress bars for training stages with these numbers of epochs; any other stage has `other` epochs."""
    console = None if is_quiet() else Console(stderr=True)
    if console is None or not console.is_terminal:
        yield StageBars(console, None, epochs, other)
        return
    with Progress(*_stage_columns(), console=console) as progress:
        yield StageBars(console, progress, epochs, other)


@contextmanager
def counter(what: str, total: int, first: int = 0) -> Iterator[Callable[[int, int], None]]:
    """Show progress over `total` things called `what`; yields a function to call with (done, total).

    On a terminal, it is a bar with the time left; elsewhere, a line every minute and one at the end. The `first` things
    were done earlier, and do not count for the speed.
    """
    console = None if is_quiet() else Console(stderr=True)
    if console is None or not console.is_terminal:
        with _counted(console, what, total, first) as advance:
            yield advance
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console) as progress:
        task = progress.add_task(what, total=total, completed=first)
        yield lambda done, _: progress.update(task, completed=done)


@contextmanager
def _counted(console: Console | None, what: str, total: int, first: int) -> Iterator[Callable[[int, int], None]]:
    begun = shown = time.monotonic()
    reached = first

    def advance(done: int, _: int) -> None:
        nonlocal reached, shown
        reached, now = done, time.monotonic()
        if console is not None and now - shown >= EVERY and done > first:
            shown, left = now, (now - begun) / (done - first) * (total - done)
            _line(console, f"{what}: {reached:,} of {total:,}, about {duration(left)} left")

    try:
        yield advance
    finally:
        if console is not None:
            _line(console, f"{what}: {reached:,} of {total:,} in {seconds(time.monotonic() - begun)} s")


class _Left(ProgressColumn):
    """The time until the task's field `until`, a time of the monotonic clock."""

    def render(self, task: Task) -> Text:
        return Text(f"about {duration(max(0.0, task.fields['until'] - time.monotonic()))} left")


@contextmanager
def timeline(steps: Mapping[str, float]) -> Iterator[Callable[[str], None]]:
    """Show progress over `steps`, which have different typical seconds; yields a function to call when a step begins.

    The time left is that of the remaining steps at the speed of those before. Without a terminal, each step is a line.
    """
    console, begun = None if is_quiet() else Console(stderr=True), time.monotonic()
    names, total = list(steps), sum(steps.values())

    def facts(name: str) -> tuple[str, float, float]:
        """The text for a step, the typical seconds before it, and the seconds left."""
        done = sum(steps[other] for other in names[: names.index(name)])
        speed = (time.monotonic() - begun) / done if done else 1.0
        return f"{name} ({names.index(name) + 1} of {len(names)})", done, (total - done) * speed

    if console is None or not console.is_terminal:
        yield lambda name: _announce(console, *facts(name))
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), _Left())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(names[0], total=total, until=begun + total)

        def begin(name: str) -> None:
            text, done, left = facts(name)
            progress.update(task, description=text, completed=done, until=time.monotonic() + left)

        yield begin


def _announce(console: Console | None, text: str, _: float, left: float) -> None:
    if console is not None:
        _line(console, f"{text}, about {duration(left)} left")


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Show what is being done; yields a function to call with a text for each new step.

    On a terminal, each text replaces the one before. When verbose, each text is a line of its own. Without a terminal,
    nothing is shown unless verbose.
    """
    console = Console(stderr=True)
    if is_quiet() or (not console.is_terminal and verbosity.get() < VERBOSE):
        yield lambda text: None
    elif verbosity.get() >= VERBOSE:
        yield lambda text: _line(console, text)
    else:
        with console.status("") as line:
            yield lambda text: line.update(text)
