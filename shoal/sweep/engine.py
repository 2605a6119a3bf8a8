"""The sweep: starts runs in the order of their needs, restarts killed ones, and stops when asked or out of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import TRY_AGAIN, ShoalError
from shoal.sweep.box import Box
from shoal.sweep.folder import Folder
from shoal.sweep.grid import Planned
from shoal.sweep.processes import Executor, Worker

POLL_SECONDS = 0.2
WAITING, RUNNING, FINISHED, FAILED, SKIPPED, STOPPED = "waiting", "running", "finished", "failed", "skipped", "stopped"
OVER = (FINISHED, FAILED, SKIPPED, STOPPED)
"""States in which a run does not change any more."""


@dataclass
class Record:
    """The state of one run: how often it was started, wall seconds of its attempts, and its result.

    `attempts` and `seconds` include those of earlier sweeps that this one resumes; `earlier` is their number of
    attempts.
    """

    run: Planned
    state: str = WAITING
    attempts: int = 0
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    error: list[str] = field(default_factory=list)
    begun: float = 0.0
    earlier: int = 0

    @property
    def elapsed(self) -> float:
        """Wall seconds of all attempts so far."""
        return self.seconds + (time.monotonic() - self.begun if self.state == RUNNING else 0.0)

    @property
    def tries(self) -> int:
        """How often this sweep has started the run."""
        return self.attempts - self.earlier


Watch = Callable[[Sequence[Record]], None]
"""A function that is called repeatedly with all records, in the order of the grid."""


class Sweep:
    """Executes runs. A run whose worker is killed continues from its checkpoint, at most `retries` times.

    Each worker may train as long as `box` grants when it starts; if that is too short, no worker is started.
    """

    def __init__(
        self, folder: Folder, runs: Sequence[Planned], executor: Executor, retries: int = 2, box: Box | None = None
    ) -> None:
        self.folder, self.executor, self.retries, self.box = folder, executor, retries, box or Box()
        self.records = {run.name: Record(run) for run in runs}
        self._workers: dict[str, tuple[Worker, int]] = {}
        self._free = list(range(executor.slots))
        self._asked = 0

    def run(self, watch: Watch = lambda records: None, asked: Callable[[], int] = lambda: 0) -> list[Record]:
        """Execute all runs; returns their records in the order of the grid.

        `asked` returns how often the sweep was asked to stop: from 1 on, no run is started and workers stop at their
        next checkpoint; from 2 on, they are killed. `box` asks in the same way when time is up. `watch` is called after
        every look at the workers. Raises ShoalError when the folder cannot be written or a worker cannot be started.
        """
        try:
            self._take_known()
            while self._advance(max(asked(), self.box.asked())):
                watch(list(self.records.values()))
                time.sleep(POLL_SECONDS)
        finally:
            for worker, _ in self._workers.values():
                worker.kill()
        watch(list(self.records.values()))
        return list(self.records.values())

    def _take_known(self) -> None:
        for record in self.records.values():
            stored = self.folder.stored(record.run)
            if stored is not None:
                record.state, record.result = FINISHED, stored["result"]
            spent = stored or self.folder.noted(record.run)
            record.attempts, record.seconds = spent["attempts"], spent["seconds"]
            record.earlier = record.attempts

    def _advance(self, asked: int) -> bool:
        """Update all runs once; False when no worker runs and none will be started."""
        self._end_as_asked(asked)
        for name in list(self._workers):
            self._collect(self.records[name])
        for record in self.records.values():
            self._consider(record, asked)
        return bool(self._workers)

    def _end_as_asked(self, asked: int) -> None:
        for worker, _ in self._workers.values():
            if self._asked < 1 <= asked:
                worker.stop()
            if self._asked < 2 <= asked:
                worker.kill()
        self._asked = asked

    def _consider(self, record: Record, asked: int) -> None:
        """Start a waiting run if it can start; skip it if a run that it needs did not finish."""
        if record.state != WAITING:
            return
        needed = [self.records[name] for name in record.run.needs]
        lost = [other.run.name for other in needed if other.state in (FAILED, SKIPPED)]
        if lost:
            record.state, record.error = SKIPPED, [f"needs {lost[0]}, which did not finish"]
        elif self._free and not asked and all(other.state == FINISHED for other in needed):
            seconds = self.box.grant()
            if seconds > 0:
                self._start(record, seconds)

    def _start(self, record: Record, seconds: float) -> None:
        slot = self._free.pop(0)
        record.state, record.begun, record.attempts = RUNNING, time.monotonic(), record.attempts + 1
        self._note(record)  # before the start, so that the attempt counts even if this process is killed
        self._workers[record.run.name] = self.executor.start(self.folder.attempt(record.run, seconds), slot), slot

    def _note(self, record: Record) -> None:
        self.folder.note(record.run, {"attempts": record.attempts, "seconds": record.seconds})

    def _collect(self, record: Record) -> None:
        """Record the outcome of an attempt that has ended."""
        worker, slot = self._workers[record.run.name]
        status = worker.poll()
        if status is None:
            return
        del self._workers[record.run.name]
        self._free = sorted([*self._free, slot])
        record.seconds = record.elapsed
        self._note(record)
        if status == 0:
            self._finish(record)
        elif status == TRY_AGAIN or (status < 0 and self._asked):
            record.state = STOPPED  # an error stays a failure after a stop request, because the run would fail again
        elif status < 0 and record.tries <= self.retries:
            record.state = WAITING
        else:
            self._fail(record, status)

    def _finish(self, record: Record) -> None:
        try:
            record.result = self.folder.output(record.run)
        except ShoalError as error:
            record.state, record.error = FAILED, [str(error), *self.folder.log_tail(record.run)]
            return
        record.state = FINISHED
        self.folder.store(record.run, {"attempts": record.attempts, "seconds": record.seconds, "result": record.result})

    def _fail(self, record: Record, status: int) -> None:
        how = f"exit status {status}" if status > 0 else f"killed by signal {-status}, {record.tries} times"
        record.state, record.error = FAILED, [how, *self.folder.log_tail(record.run)]
