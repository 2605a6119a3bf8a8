"""Progress bars for stages of training, on standard error, so that `--json` output stays clean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class StageBars:
    """One bar a stage, stepping by batches; `listen` is what recipes call."""

    def __init__(self, progress: Progress, epochs: dict[str, int]) -> None:
        self.progress, self.epochs = progress, epochs
        self.tasks: dict[str, Any] = {}

    def listen(self, stage: str, epoch: int, step: int, steps: int) -> None:
        """Move the bar of `stage` to batch `step` of `epoch`."""
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=self.epochs.get(stage, 1) * steps)
        self.progress.update(self.tasks[stage], completed=epoch * steps + step + 1)


@contextmanager
def bars(epochs: dict[str, int]) -> Iterator[StageBars]:
    """Bars for stages with the given numbers of epochs."""
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield StageBars(progress, epochs)
