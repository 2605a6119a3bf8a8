"""The folder of a sweep: `grid.json` (its runs), `runs/`, `logs/`, and `results/` with one file per finished run."""

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
"""Number of log lines that are shown for a failed run."""
FREE = ("--shard-mb", "--save-seconds", "--device", "--step", "--data-dir")
"""Options that may change when a run is resumed. The run itself checks the data at a new path."""
SPENT = {"attempts": int, "seconds": (int, float)}
"""What is stored for every run that was started, and its types."""


class Spent(TypedDict):
    """What a run has taken so far: number of attempts, and their wall seconds."""

    attempts: int
    seconds: float


class Stored(Spent):
    """What is stored for a finished run: also the JSON object that it printed."""

    result: dict[str, Any]


class Folder:
    """The folder of a sweep. Only one sweep at a time can use it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, runs: Sequence[Planned], resume: bool) -> None:
        """Raise ShoalError, before anything is written, when `runs` cannot be started or resumed here.

        A resumed grid may have more or fewer runs than before. A run in both must have the same command line, except
        for the options in `FREE`.
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
        """Make the folder and record `runs`; within the block, the folder is locked against other sweeps.

        Raises ShoalError when another sweep has locked it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ShoalError(f"found no folder to write at {self.path} ({error}); choose another --out") from error
        try:
            self._lock(handle)
            known = self._grid() if self._has_grid() else {}
            # Written first, because a folder with files but no grid is not recognised as a sweep's.
            write_text(self.path / "grid.json", json.dumps(known | {run.name: run.words for run in runs}, indent=1))
            for part in ("runs", "logs", "results"):
                (self.path / part).mkdir(exist_ok=True)
            yield
        finally:
            os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # locks the folder itself, so no lock file is left
        except OSError as error:
            raise ShoalError(
                f"found another sweep at work in {self.path}; need one sweep at a time; wait for it, or choose "
                "another --out"
            ) from error

    def _has_grid(self) -> bool:
        return (self.path / "grid.json").exists()

    def _grid(self) -> dict[str, Any]:
        body = read_json(self.path / "grid.json")
        if not isinstance(body, dict):
            raise ShoalError(f"found no grid in {self.path / 'grid.json'}; need the file that shoal wrote; put it back")
        return body

    def names(self) -> list[str]:
        """The names of all runs of the grid; empty if the folder holds no sweep. Raises ShoalError as `check` does."""
        return list(self._grid()) if self._has_grid() else []

    def attempt(self, run: Planned, seconds: float = math.inf) -> Attempt:
        """An attempt at `run`, which resumes from its last checkpoint, if any, and trains for at most `seconds`."""
        limit = ("--max-seconds", f"{seconds:.1f}") if math.isfinite(seconds) else ()
        words = (run.words[0], "--json", "--resume", *limit, *run.words[1:])
        return Attempt(words, self.log(run), self._output(run))

    def _output(self, run: Planned) -> Path:
        return self.path / "results" / f".{run.name}.out"

    def _note(self, run: Planned) -> Path:
        return self.path / "results" / f".{run.name}.json"  # no run's name begins with a dot

    def log(self, run: Planned) -> Path:
        """Log file of all attempts at `run`."""
        return self.path / "logs" / f"{run.name}.log"

    def log_tail(self, run: Planned) -> list[str]:
        """The last lines of the run's log that are not empty, at most TAIL_LINES."""
        try:
            with self.log(run).open(errors="replace") as file:
                return list(deque((line.rstrip() for line in file if line.strip()), TAIL_LINES))
        except OSError as error:
            return [f"no log: {error}"]

    def output(self, run: Planned) -> dict[str, Any]:
        """The JSON object that a finished attempt printed. Raises ShoalError when there is none."""
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
        """Store the result of a finished run, so that it is not repeated."""
        write_text(self.path / "results" / f"{run.name}.json", json.dumps(result, indent=1))
        self._output(run).unlink(missing_ok=True)
        self._note(run).unlink(missing_ok=True)

    def stored(self, run: Planned) -> Stored | None:
        """What `store` wrote; None if the run has not finished. Raises ShoalError when the file is damaged."""
        path = self.path / "results" / f"{run.name}.json"
        if not path.exists():
            return None
        body = _read(path, SPENT | {"result": dict}, "repeat the run")
        return Stored(attempts=body["attempts"], seconds=body["seconds"], result=body["result"])

    def note(self, run: Planned, spent: Spent) -> None:
        """Store the attempts and seconds of an unfinished run, for the sweep that resumes it."""
        write_text(self._note(run), json.dumps(spent))

    def noted(self, run: Planned) -> Spent:
        """What `note` wrote last, or zeros. Raises ShoalError when the file is damaged."""
        path = self._note(run)
        if not path.exists():
            return Spent(attempts=0, seconds=0.0)
        body = _read(path, SPENT, "count from 0 again")
        return Spent(attempts=body["attempts"], seconds=body["seconds"])


def run_folders(path: Path) -> list[Path]:
    """The run folders of the sweep at `path` that exist, in the order of its grid; empty if there is no sweep.

    Raises ShoalError when the file of the grid is damaged.
    """
    return [place for name in Folder(path).names() if (place := path / "runs" / name).is_dir()]


def _read(path: Path, kinds: Mapping[str, Any], then: str) -> Mapping[str, Any]:
    body = read_json(path)
    if not isinstance(body, dict) or not all(isinstance(body.get(key), kind) for key, kind in kinds.items()):
        raise ShoalError(f"found no result in {path}; need the file that shoal wrote; remove it to {then}")
    return body


def _compared(words: Any, name: str) -> Any:
    """The command line without the options in `FREE` and without the path of the sweep's folder."""
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
