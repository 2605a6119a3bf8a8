"""Sweeps in time boxes: laws on a clock of the test's own, and the same results as in one go with real workers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.errors import TRY_AGAIN, ShoalError
from shoal.storage.run import Run
from shoal.sweep import engine
from shoal.sweep.box import ENDING, GRACE, SHORTEST, STARTING, WORTH, Box
from shoal.sweep.engine import Record, Sweep
from shoal.sweep.folder import Folder
from shoal.sweep.grid import Planned
from shoal.sweep.processes import Attempt, Executor
from tests.support.attempts import Forked
from tests.sweep.test_engine import planned
from tests.sweep.test_sweep import PAIR, epochs_of
from tests.sweep.test_sweep import planned as planned_grid

TICK = 0.5


@dataclass
class World:
    """A clock, and for each run the seconds of work that are left, those done, and how its processes behave."""

    left: dict[str, float]
    starting: float = 5.0
    obeys: bool = True
    now: float = 1000.0
    worked: dict[str, float] = field(default_factory=dict)
    starts: list[tuple[str, float]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    slots: int = 2

    def start(self, attempt: Attempt, slot: int) -> Working:
        return Working(self, attempt)

    def close(self) -> None: ...


class Working:
    """An attempt that works a second in a second, once started, and keeps to its --max-seconds."""

    def __init__(self, world: World, attempt: Attempt) -> None:
        words = attempt.words
        self.world, self.attempt, self.name, self.begun = world, attempt, attempt.log.stem, world.now
        self.limit = float(words[words.index("--max-seconds") + 1]) if "--max-seconds" in words else math.inf
        self.ended: int | None = None
        world.starts.append((self.name, self.limit))

    def _works(self) -> float:
        return max(0.0, self.world.now - self.begun - self.world.starting)

    def poll(self) -> int | None:
        need = self.world.left[self.name]
        if self.ended is None and self._works() >= min(need, self.limit):
            self._end(min(need, self.limit))
        return self.ended

    def _end(self, done: float) -> None:
        self.world.left[self.name] -= done
        self.world.worked[self.name] = self.world.worked.get(self.name, 0.0) + done
        self.ended = TRY_AGAIN if self.world.left[self.name] > 0 else 0
        if self.ended == 0:
            self.attempt.result.write_text("{}")

    def stop(self) -> None:
        self.world.stopped.append(self.name)
        if self.world.obeys:
            self._end(min(self._works(), self.limit, self.world.left[self.name]))

    def kill(self) -> None:
        self.world.killed.append(self.name)
        self.ended = -9


@pytest.fixture(autouse=True)
def _time_passes_by_looks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setattr(engine, "POLL_SECONDS", 0.0)


def boxed(folder: Path, runs: list[Planned], world: World, seconds: float | None) -> list[Record]:
    """A sweep in a box of the world's time."""
    home = Folder(folder)
    home.check(runs, resume=True)

    def tick(records: object) -> None:
        world.now += TICK

    with home.opened(runs):
        return Sweep(home, runs, world, box=Box(seconds, lambda: world.now)).run(watch=tick)


def test_a_box_by_hand() -> None:
    moment = [0.0]
    box = Box(100.0, lambda: moment[0])
    rows = [(0, 85, 0), (50, 35, 0), (75, 10, 0), (75.5, 0, 0), (94.5, 0, 0), (95, 0, 1), (159, 0, 1), (160, 0, 2)]
    for now, grant, asked in rows:
        moment[0] = now
        assert (box.grant(), box.asked()) == (grant, asked)
    assert (Box().grant(), Box().asked()) == (math.inf, 0)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.floats(SHORTEST, 300),
    st.floats(0, 1.5 * STARTING),  # with 2 * STARTING, the shortest box leaves no time for work
    st.integers(1, 3),
)
@settings(max_examples=40)
def test_boxes_end_in_time_and_add_up(work: list[int], seconds: float, starting: float, slots: int) -> None:
    names = [f"r{i}" for i in range(len(work))]
    world = World({n: float(w) for n, w in zip(names, work, strict=True)}, starting, slots=slots)
    with tempfile.TemporaryDirectory() as folder:
        runs = [planned(Path(folder), n, *([names[i - 2]] if i > 1 else [])) for i, n in enumerate(names)]
        for _ in range(400):
            begun = world.now
            records = boxed(Path(folder), runs, world, seconds)
            assert world.now <= begun + seconds + 2 * TICK
            assert {record.state for record in records} <= {"finished", "stopped", "waiting"}
            if all(record.state == "finished" for record in records):
                break
    assert {record.state for record in records} == {"finished"}
    assert world.worked == pytest.approx({n: float(w) for n, w in zip(names, work, strict=True)})  # none of it twice
    assert [record.attempts for record in records] == [sum(n == name for n, _ in world.starts) for name in names]
    assert all(limit >= WORTH for _, limit in world.starts)
    assert world.killed == []
    if starting <= STARTING - TICK:
        assert world.stopped == []  # all stopped by themselves


def test_what_does_not_stop_is_asked_and_killed_well_after(tmp_path: Path) -> None:
    world = World({"a": 1e9, "b": 1e9}, starting=1e6, obeys=False, slots=1)
    runs = [planned(tmp_path, "a"), planned(tmp_path, "b")]
    records = boxed(tmp_path, runs, world, 100)
    assert [record.state for record in records] == ["stopped", "waiting"]
    assert (world.stopped, world.killed, [name for name, _ in world.starts]) == (["a"], ["a"], ["a"])
    assert 1000 + 100 + GRACE <= world.now <= 1000 + 100 + GRACE + 2 * TICK
    assert ENDING < GRACE


def test_without_a_box_no_limit_is_given(tmp_path: Path) -> None:
    world = World({"a": 3.0})
    (record,) = boxed(tmp_path, [planned(tmp_path, "a")], world, None)
    assert (record.state, world.starts) == ("finished", [("a", math.inf)])


def test_a_resumed_run_has_all_its_retries_and_its_seconds(tmp_path: Path) -> None:
    runs, world = [planned(tmp_path, "a")], World({"a": 60.0})
    (record,) = boxed(tmp_path, runs, world, SHORTEST)
    note = tmp_path / "results" / ".a.json"
    assert json.loads(note.read_text()) == {"attempts": 1, "seconds": record.seconds}
    note.write_text('{"attempts": 7, "seconds": 1000.0}')
    (record,) = boxed(tmp_path, runs, world, None)
    assert (record.state, record.attempts, record.tries) == ("finished", 8, 1)
    assert 1000 <= record.seconds < 1060
    stored = Folder(tmp_path).stored(runs[0])
    assert stored is not None
    assert (stored["attempts"], stored["seconds"]) == (8, record.seconds)
    assert not note.exists()
    (tmp_path / "results" / "a.json").unlink()
    note.write_text('{"attempts": "many"}')
    with pytest.raises(ShoalError, match=r"need the file that shoal wrote; remove it to count from 0 again"):
        boxed(tmp_path, runs, world, None)


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "24.9"])
def test_a_box_in_which_no_run_would_be_started(seconds: str, tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(PAIR)
    done = CliRunner().invoke(app, ["sweep", str(grid), "--out", str(out), "--max-seconds", seconds])
    assert isinstance(done.exception, ShoalError)
    assert "need 25 or more to start a run" in str(done.exception)
    assert not out.exists()


GRID = """
stages:
  - name: teacher
    command: train
    model: resnet10
    data: digits
    width: 0.125
    limit: 900
    epochs: 6
    grid: {seed: [0]}
  - name: reduced
    command: reduce
    teacher: "{teacher}"
    epochs: "1,2,2"
    grid: {seed: [0], budget: [900]}
"""


CUTS = [[0.1], [0.1], [math.inf, 0.1], [1.0], [0.1], [math.inf]]
"""Seconds for each start of a sweep, box by box: a step or a few, but for what ends the teacher and the reduction."""


class Short(Box):
    """A box that grants what it is told to, its last item from then on."""

    def __init__(self, seconds: list[float]) -> None:
        super().__init__()
        self.seconds = list(seconds)

    def grant(self) -> float:
        return self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]


def checksum(run: Planned) -> str:
    return hashlib.sha256((run.folder / "model.safetensors").read_bytes()).hexdigest()


def figures(record: Record) -> dict[str, object]:
    return {key: value for key, value in record.result.items() if key not in ("out", "teacher", "environment")}


def epochs_by_stage(run: Planned) -> list[tuple[str, int]]:
    return [(row["stage"], row["epoch"]) for row in Run(run.folder).metrics()]


def sweep_once(folder: Path, runs: tuple[Planned, ...], place: Executor, box: Box) -> list[Record]:
    home = Folder(folder / "sweep")
    home.check(runs, resume=True)
    with home.opened(runs):
        return Sweep(home, runs, place, box=box).run()


@pytest.mark.slow
def test_a_sweep_cut_into_boxes_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole_runs, runs = planned_grid(tmp_path / "whole", GRID), planned_grid(tmp_path / "cut", GRID)
    whole, spent = sweep_once(tmp_path / "whole", whole_runs, Forked(), Box()), [0.0] * 2
    for grants in CUTS:
        begun = time.monotonic()
        cut = sweep_once(tmp_path / "cut", runs, Forked(), Short(grants))
        took = time.monotonic() - begun
        assert {record.state for record in cut} <= {"finished", "stopped", "waiting"}
        now = [record.seconds for record in cut]
        assert all(0 <= new - old <= took for new, old in zip(now, spent, strict=True))
        spent = now
    assert [(record.state, record.attempts) for record in cut] == [("finished", 3), ("finished", 4)]
    assert list(map(figures, cut)) == list(map(figures, whole))
    assert list(map(checksum, runs)) == list(map(checksum, whole_runs))
    assert list(map(epochs_by_stage, runs)) == list(map(epochs_by_stage, whole_runs))  # every one, and once


def left_off(run: Planned) -> str:
    """A checksum of where the run's training stopped last."""
    last = sorted(run.folder.rglob("*.last.*"))
    assert last
    return hashlib.sha256(b"".join(path.read_bytes() for path in last)).hexdigest()


@pytest.mark.slow
def test_the_command_keeps_to_its_box_and_goes_on_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's box is a second of training a start; that boxes end in time is a law on the clock above."""
    given: list[float | None] = []

    class Brief(Box):
        def __init__(self, seconds: float | None = None) -> None:
            super().__init__(seconds)
            given.append(seconds)
            assert self.now is time.monotonic

        def grant(self) -> float:
            return 1.0

        def asked(self) -> int:
            return 0

    monkeypatch.setattr(sys.modules["shoal.cli.sweep"], "Box", Brief)
    monkeypatch.setattr(sys.modules["shoal.cli.sweep"], "executor", lambda *_: Forked())
    runs = planned_grid(tmp_path, PAIR.replace("epochs: 12", "epochs: 3000"))
    words = ("sweep", tmp_path / "grid.yaml", "--out", tmp_path / "sweep", "--workers", "2", "--max-seconds", "28")
    before = ["", ""]
    for attempt in (1, 2):
        done = CliRunner().invoke(app, [str(word) for word in (*words, "--resume")])
        assert done.exit_code == TRY_AGAIN, done.output
        assert "2 of 2 runs stopped or waiting" in done.output
        rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
        assert [(row["state"], row["attempts"]) for row in rows] == [("stopped", attempt)] * 2
        now = [left_off(run) for run in runs]
        assert all(new != old for new, old in zip(now, before, strict=True))  # a step at least, however slow
        before = now
    assert given == [28.0, 28.0]
    for run in runs:
        assert [row["epoch"] for row in Run(run.folder).metrics()] == list(range(epochs_of(run)))
        log = Folder(tmp_path / "sweep").log(run).read_text()
        assert ("time is up" in log, "stopping at a checkpoint" in log) == (True, False), log[-2000:]
    assert os.listdir(tmp_path / "sweep" / "results")
