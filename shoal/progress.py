"""Progress bars, on standard error, so that `--json` output stays clean."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

verbosity: ContextVar[int] = ContextVar("verbosity", default=0)
"""-1 shows no progress and no notes, 0 is usual, 1 and more show more."""


def set_verbosity(level: int) -> None:
    """Set how much is shown from here on: -1 quiet, 0 usual, 1 and more for the library's log on standard error."""
    verbosity.set(level)
    if level > 0:
        logging.basicConfig(level=logging.DEBUG if level > 1 else logging.INFO)


class StageBars:
    """One bar a stage, stepping by batches; `listen` is what recipes call."""

    def __init__(self, progress: Progress, epochs: dict[str, int], other: int = 1) -> None:
        self.progress, self.epochs, self.other = progress, epochs, other
        self.tasks: dict[str, Any] = {}

    def listen(self, stage: str, epoch: int, step: int, steps: int) -> None:
        """Move the bar of `stage` to batch `step` of `epoch`."""
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=self.epochs.get(stage, self.other) * steps)
        self.progress.update(self.tasks[stage], completed=epoch * steps + step + 1)


def _columns(unit: str) -> tuple[Any, ...]:
    return (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )


@contextmanager
def counter(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """One bar over `total` things; what is yielded is called with (done, total)."""
    with Progress(*_columns(""), console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, _: progress.update(task, completed=done)


@contextmanager
def bars(epochs: dict[str, int], other: int = 1) -> Iterator[StageBars]:
    """Bars for stages with the given numbers of epochs; stages that are not named have `other` epochs."""
    with Progress(*_columns("batches"), console=Console(stderr=True)) as progress:
        yield StageBars(progress, epochs, other)


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line that says what is being done; what is yielded is called with it."""
    with Console(stderr=True).status("") as line:
        yield lambda text: line.update(text)
