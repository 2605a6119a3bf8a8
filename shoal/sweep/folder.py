"""The folder of a sweep: `grid.json` (its runs), `runs/`, `logs/`, `results/`, one file a finished run."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from shoal.errors import ShoalError
from shoal.storage.files import read_json, write_text
from shoal.storage.run import Run
from shoal.sweep.grid import Planned
from shoal.sweep.processes import Attempt

TAIL_LINES = 8
"""Lines of a log that tell why a run failed."""
FREE = ("--shard-mb", "--save-seconds", "--device", "--step", "--data-dir")
"""Options that a run may go on with otherwise: what lies at another place is compared by the run itself."""
SPENT = {"attempts": int, "seconds": (int, float)}
"""What is kept of every run that was started, and its types."""


class Spent(TypedDict):
    """What a run has taken so far: how often it was started, and wall seconds."""

    attempts: int
    seconds: float


class Stored(Spent):
    """What is kept of a finished run: the JSON that it printed, too."""

    result: dict[str, Any]


class Folder:
    """Where a sweep keeps everything; one sweep at a time works there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, runs: Sequence[Planned], resume: bool) -> None:
        """Raise ShoalError, before anything is written, when `runs` cannot be made or gone on with here.

        A resumed grid may have more or fewer runs than before, but a run that both have must be the same, but for the
        options in `FREE`.
        """
        if not self._has_grid():
            Run(self.path).check_free()
            return
        if not resume:
            raise ShoalError(f"found a sweep at {self.path}; need --resume to go on with it, or another --out")
        old = self._grid()
        for run in runs:
            if run.name in old and _compared(old[run.name], run.name) != _compared(list(run.words), run.name):
                ours, theirs = " ".join(run.words), " ".join(map(str, old[run.name]))
                raise ShoalError(
                    f"found run {run.name!r} made with other options at {self.path} (shoal {theirs}); need the same to "
                    f"resume, not shoal {ours}; choose another --out"
                )

    @contextmanager
    def opened(self, runs: Sequence[Planned]) -> Iterator[None]:
        """Make the folder and record `runs`; within the block no other sweep may work here.

        Raises ShoalError when one does, or when the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ShoalError(f"found no folder to write at {self.path} ({error}); choose another --out") from error
        try:
            self._lock(handle)
            known = self._grid() if self._has_grid() else {}
            # First of all: a folder with anything else in it and no grid would be taken for somebody else's.
            write_text(self.path / "grid.json", json.dumps(known | {run.name: run.words for run in runs}, indent=1))
            for part in ("runs", "logs", "results"):
                (self.path / part).mkdir(exist_ok=True)
            yield
        finally:
            os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the folder itself: it leaves no file behind
        except OSError as error:
            raise ShoalError(
                f"found another sweep at work in {self.path}; need it for one at a time; wait for it, or choose "
                "another --out"
            ) from error

    def _has_grid(self) -> bool:
        return (self.path / "grid.json").exists()

    def _grid(self) -> dict[str, Any]:
        body = read_json(self.path / "grid.json")
        if not isinstance(body, dict):
            raise ShoalError(f"found no grid in {self.path / 'grid.json'}; need the file that shoal wrote; put it back")
        return body

    def attempt(self, run: Planned, seconds: float = math.inf) -> Attempt:
        """A start of `run`, which goes on from its last checkpoint if it has one, and may train so many seconds."""
        limit = ("--max-seconds", f"{seconds:.1f}") if math.isfinite(seconds) else ()
        words = (run.words[0], "--json", "--resume", *limit, *run.words[1:])
        return Attempt(words, self.log(run), self._output(run))

    def _output(self, run: Planned) -> Path:
        return self.path / "results" / f".{run.name}.out"

    def _note(self, run: Planned) -> Path:
        return self.path / "results" / f".{run.name}.json"  # no run's name begins with a dot

    def log(self, run: Planned) -> Path:
        """What all attempts at `run` said."""
        return self.path / "logs" / f"{run.name}.log"

    def log_tail(self, run: Planned) -> list[str]:
        """The last lines of its log that are not empty."""
        try:
            with self.log(run).open(errors="replace") as file:
                return list(deque((line.rstrip() for line in file if line.strip()), TAIL_LINES))
        except OSError as error:
            return [f"no log: {error}"]

    def output(self, run: Planned) -> dict[str, Any]:
        """The JSON that a finished attempt printed. Raises ShoalError when it printed none."""
        path = self._output(run)
        try:
            body = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ShoalError(f"found no JSON from run {run.name!r} at {path} ({error}); see its log") from error
        if not isinstance(body, dict):
            raise ShoalError(
                f"found {type(body).__name__} from run {run.name!r} at {path}; need an object; see its log"
            )
        return body

    def store(self, run: Planned, result: Stored) -> None:
        """Keep what is known of a finished run: it will not be repeated."""
        write_text(self.path / "results" / f"{run.name}.json", json.dumps(result, indent=1))
        self._output(run).unlink(missing_ok=True)
        self._note(run).unlink(missing_ok=True)

    def stored(self, run: Planned) -> Stored | None:
        """What `store` kept; None for a run that has not finished. Raises ShoalError for a damaged file."""
        path = self.path / "results" / f"{run.name}.json"
        if not path.exists():
            return None
        body = _read(path, SPENT | {"result": dict}, "repeat the run")
        return Stored(attempts=body["attempts"], seconds=body["seconds"], result=body["result"])

    def note(self, run: Planned, spent: Spent) -> None:
        """Keep what an unfinished run has taken so far, for the sweep that goes on with it."""
        write_text(self._note(run), json.dumps(spent))

    def noted(self, run: Planned) -> Spent:
        """What `note` kept last; nothing spent where it has not. Raises ShoalError for a damaged file."""
        path = self._note(run)
        if not path.exists():
            return Spent(attempts=0, seconds=0.0)
        body = _read(path, SPENT, "count from 0 again")
        return Spent(attempts=body["attempts"], seconds=body["seconds"])


def _read(path: Path, kinds: Mapping[str, Any], then: str) -> Mapping[str, Any]:
    body = read_json(path)
    if not isinstance(body, dict) or not all(isinstance(body.get(key), kind) for key, kind in kinds.items()):
        raise ShoalError(f"found no result in {path}; need the file that shoal wrote; remove it to {then}")
    return body


def _compared(words: Any, name: str) -> Any:
    """A command line without what decides only where and how it runs: `FREE`, and where the sweep's folder lies."""
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or "--out" not in words:
        return words
    kept = list(words)
    for option in FREE:
        if option in kept:
            place = kept.index(option)
            del kept[place : place + 2]
    out, inside = kept[kept.index("--out") + 1], f"runs/{name}"
    home = out.removesuffix(inside) if out.endswith(inside) else ""
    return [word.removeprefix(home) for word in kept]
