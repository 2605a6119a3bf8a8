"""Progress of a sweep: a live table on a terminal, otherwise a line for each change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live

from shoal import units
from shoal.errors import ShoalError
from shoal.progress import is_quiet
from shoal.report.layout import Grid
from shoal.storage.run import Epoch, Run
from shoal.sweep.engine import FAILED, FINISHED, RUNNING, SKIPPED, STOPPED, WAITING, Record, Watch
from shoal.sweep.results import flat, headline

ORDER = (RUNNING, FAILED, STOPPED, FINISHED, WAITING, SKIPPED)
"""States in the order of the table, since a terminal may have fewer lines than the sweep has runs."""
FRAME_LINES = 6
"""Lines of the table that are not runs: title, headings, borders and caption."""


class Metrics:
    """The latest epoch of each run. A file is read again only when its size has changed."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, Epoch]] = {}

    def newest(self, record: Record) -> Epoch:
        """The last row of the run's metrics: `stage`, `epoch`, `accuracy`; empty before the first epoch."""
        path = record.run.folder / "metrics.jsonl"
        try:
            size = path.stat().st_size
            if self._seen.get(record.run.name, (-1, {}))[0] != size:
                rows = Run(record.run.folder).metrics()
                self._seen[record.run.name] = size, rows[-1] if rows else {}
        except (OSError, ShoalError):  # no epoch yet, or a damaged file, which the run itself will report
            return {}
        return self._seen[record.run.name][1]


def cells(record: Record, metrics: Metrics) -> list[str]:
    """A row of the live table: run, state, training stage, finished epochs, accuracy, seconds, attempts."""
    newest = metrics.newest(record)
    accuracy: Any = headline(flat(record.result), "accuracy") if record.state == FINISHED else newest.get("accuracy")
    return [
        record.run.name,
        record.state,
        str(newest.get("stage", "")),
        str(newest["epoch"] + 1) if "epoch" in newest else "",
        "" if accuracy is None else units.percent(accuracy),
        units.count(round(record.elapsed)) if record.attempts else "",
        str(record.attempts) if record.attempts > 1 else "",
    ]


def table(records: Sequence[Record], metrics: Metrics, lines: int) -> Grid:
    """A table of all runs, or of as many as `lines` lines can show, in the order of `ORDER`."""
    states = Counter(record.state for record in records)
    shown = sorted(records, key=lambda record: ORDER.index(record.state))[: max(1, lines - FRAME_LINES)]
    title = ", ".join(f"{states[state]} {state}" for state in ORDER if states[state])
    left_out = len(records) - len(shown)
    caption = f"and {left_out} more runs" if left_out else ""
    head = ("run", "state", "stage", "epochs", "accuracy, %", "seconds", "attempts")
    rows = [cells(record, metrics) for record in shown]
    return Grid(title, head, rows, texts=(0, 1, 2), shorten=True, caption=caption)


class Lines:
    """Progress for logs and pipes: a line when a run starts, is restarted, or ends."""

    def __init__(self, console: Console) -> None:
        self.console, self.metrics = console, Metrics()
        self._seen: dict[str, tuple[str, int]] = {}

    def watch(self, records: Sequence[Record]) -> None:
        """Print what has changed since the last call."""
        for record in records:
            now = record.state, record.attempts
            if now != self._seen.get(record.run.name, (WAITING, 0)):
                self.console.print(self._line(record), markup=False, highlight=False, soft_wrap=True)
            self._seen[record.run.name] = now

    def _line(self, record: Record) -> str:
        again = f", attempt {record.attempts}" if record.attempts > 1 else ""
        accuracy = headline(flat(record.result), "accuracy")
        found = f": accuracy {units.percent(accuracy)} %" if accuracy is not None else ""
        took = f", {units.duration(record.elapsed)}" if record.state != RUNNING and record.attempts else ""
        why = f": {record.error[0]}" if record.error else ""
        return f"{record.state} {record.run.name}{again}{found}{took}{why}"


@contextmanager
def showing(console: Console) -> Iterator[Watch]:
    """Yields the function that `Sweep.run` calls to show progress.

    It updates one table on a terminal, prints lines elsewhere, and shows nothing when quiet.
    """
    if is_quiet():
        yield lambda records: None
        return
    if not console.is_terminal:
        yield Lines(console).watch
        return
    metrics = Metrics()
    with Live(console=console, auto_refresh=False) as live:
        yield lambda records: live.update(table(records, metrics, console.height), refresh=True)
