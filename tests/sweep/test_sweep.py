"""Sweeps of real runs, six a time, on local processes and on Ray: stops, kills, failures, resumes, orphans."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer.main

from shoal.cli.app import app
from shoal.cli.signals import Asked
from shoal.cli.sweep import commands
from shoal.errors import TRY_AGAIN, ShoalError
from shoal.storage.run import Run
from shoal.sweep.cluster import RayExecutor
from shoal.sweep.engine import Record, Sweep
from shoal.sweep.folder import Folder
from shoal.sweep.grid import Planned, read_grid
from shoal.sweep.processes import Attempt, Executor, LocalExecutor, Process
from tests.cli.test_commands import call
from tests.support.attempts import Forked
from tests.support.processes import gone, shoal
from tests.support.waiting import HANG, eventually

EPOCHS = 6
GRID = f"""
stages:
  - name: teacher
    command: train
    model: resnet10
    data: digits
    width: 0.125
    limit: 300
    epochs: {EPOCHS}
    grid: {{seed: [0, 1]}}
  - name: reduced
    command: reduce
    teacher: "{{teacher}}"
    gates: false
    exit: false
    epochs: "1,1,1"
    grid: {{seed: [0, 1], budget: [900, 99999999]}}
"""
FIRST = "teacher-seed=0"
RAYS_OWN_WARNINGS = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def planned(folder: Path, text: str = GRID) -> tuple[Planned, ...]:
    (folder / "grid.yaml").write_text(text)
    return read_grid(folder / "grid.yaml", commands(typer.main.get_command(app)), folder / "sweep")


def epochs_of(run: Planned) -> int:
    return len(Run(run.folder).metrics())


def pids(word: object) -> list[int]:
    """Processes that have the word on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(word).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # ended while we looked
            continue
    return found


def sweep(folder: Path, runs: tuple[Planned, ...], place: Executor, asked: Asked = lambda: 0) -> list[Record]:
    home = Folder(folder / "sweep")
    home.check(runs, resume=True)
    with home.opened(runs):
        return Sweep(home, runs, place).run(asked=asked)


def kill_after_an_epoch(run: Planned, killed: list[int], place: Executor) -> threading.Thread:
    """SIGKILL for the run's process as soon as it has ended one more epoch."""
    before = epochs_of(run)

    def wait_and_kill() -> None:
        if eventually(lambda: epochs_of(run) > before):
            for pid in [place.pids[run.name]] if isinstance(place, Forked) else pids(run.folder):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


@pytest.mark.slow
def test_six_runs_stopped_killed_failed_and_resumed(tmp_path: Path) -> None:
    runs, place = planned(tmp_path), Forked()
    first = next(run for run in runs if run.name == FIRST)
    stopped = sweep(tmp_path, runs, place, lambda: int(epochs_of(first) > 0))
    assert stopped[0].state == "stopped"
    assert {record.state for record in stopped if record.run.stage == "reduced"} == {"waiting"}
    assert 0 < epochs_of(first) < EPOCHS
    assert "time is up" in Folder(tmp_path / "sweep").log(first).read_text()

    killed: list[int] = []
    thread = kill_after_an_epoch(first, killed, place)
    records = {record.run.name: record for record in sweep(tmp_path, runs, place)}
    thread.join()
    assert len(killed) == 1
    assert {name: r.state for name, r in records.items()} == {
        run.name: "failed" if run.axes.get("budget") == 99999999 else "finished" for run in runs
    }
    before = {record.run.name: record.attempts for record in stopped}
    assert {name: r.attempts - before[name] for name, r in records.items()} == {n: 1 + (n == FIRST) for n in records}
    bad = records["reduced-seed=0-budget=99999999"]
    assert bad.error[0] == "exit status 1"
    assert "found a budget of 99,999,999" in " ".join(bad.error[1:])

    whole = json.loads(call("train", *first.words[3:-2], "--json", "--out", tmp_path / "whole", "--", "resnet10"))
    result = records[FIRST].result
    assert {k: result[k] for k in whole if k != "out"} == {k: whole[k] for k in whole if k != "out"}
    assert records["reduced-seed=0-budget=900"].result["reduced"]["relus"] <= 900

    again = sweep(tmp_path, planned(tmp_path, GRID.replace(", 99999999", "")), _Refusing())
    assert [r.state for r in again] == ["finished"] * 4
    assert all(r.result == records[r.run.name].result for r in again)


class _Refusing:
    """An executor for sweeps that have nothing left to do."""

    slots = 1

    def start(self, attempt: Any, slot: int) -> Any:
        raise AssertionError(f"started {attempt.words}")

    def close(self) -> None: ...


PAIR = """
command: train
model: resnet10
data: digits
width: 0.125
limit: 300
epochs: 12
grid: {seed: [0, 1]}
"""


def wait_for_epochs(runs: tuple[Planned, ...], count: int) -> None:
    assert eventually(lambda: all(epochs_of(run) >= count for run in runs))


def test_a_process_is_stopped_killed_and_says_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (program, end, status) in enumerate(
        [
            ("import sys; sys.exit(len(sys.argv))", None, 3),
            ("import time; print(flush=True); time.sleep(999)", Process.stop, -signal.SIGTERM),
            ("import time; print(flush=True); time.sleep(999)", Process.kill, -signal.SIGKILL),
        ]
    ):
        monkeypatch.setattr("shoal.sweep.processes.START", program)
        attempt = Attempt(("a", "b"), tmp_path / f"{number}.log", tmp_path / f"{number}.json")
        process = LocalExecutor(2).start(attempt, 0)
        if end is not None:
            assert eventually(lambda at=attempt.result: at.read_text() == "\n")
            assert process.poll() is None
            end(process)
        assert eventually(lambda run=process: run.poll() is not None)
        assert process.poll() == status


@pytest.mark.slow
def test_a_killed_worker_goes_on_where_it_was(tmp_path: Path) -> None:
    runs, place = planned(tmp_path, PAIR)[:1], Forked()
    killed: list[int] = []
    thread = kill_after_an_epoch(runs[0], killed, place)
    (record,) = sweep(tmp_path, runs, place)
    thread.join()
    assert (len(killed), record.state, record.attempts) == (1, "finished", 2)
    # An epoch is logged after its checkpoint: a kill between the two leaves it out, and none is there twice.
    epochs = [row["epoch"] for row in Run(runs[0].folder).metrics()]
    assert epochs[0] == 0
    assert epochs == sorted(set(epochs))


@pytest.mark.slow
def test_no_worker_outlives_a_killed_sweep_and_ctrl_c_stops_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = planned(tmp_path, PAIR)
    words = ("sweep", tmp_path / "grid.yaml", "--out", tmp_path / "sweep", "--workers", "2")
    with shoal(*words) as process:
        wait_for_epochs(runs, 1)
        workers = [pid for run in runs for pid in pids(run.folder)]
        assert len(workers) == 2
        process.send_signal(signal.SIGKILL)
        assert all(gone(pid) for pid in workers)
    done = [epochs_of(run) for run in runs]
    with shoal(*words, "--resume") as process:
        assert eventually(lambda: all(epochs_of(run) > n for run, n in zip(runs, done, strict=True)))
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=HANG)[1]
        assert process.returncode == TRY_AGAIN
    assert "stopping all runs at checkpoints" in said
    assert f"stopped {runs[0].name}" in said
    monkeypatch.setattr(sys.modules["shoal.cli.sweep"], "executor", lambda *_: Forked())
    call(*words, "--resume")
    body = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert body["unfinished"] == []
    assert body["groups"][0]["seeds"] == [0, 1]
    assert body["groups"][0]["sd"]["accuracy"] is not None


@pytest.mark.slow
def test_sigterm_stops_a_lone_command_at_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("train", "resnet10", "--data", "digits", "--width", "0.125", "--limit", "300", "--epochs", "200")
    attempt = Attempt((*words, "--out", str(out)), tmp_path / "log", tmp_path / "json")
    process = Forked().start(attempt, 0)
    assert eventually(lambda: bool(Run(out).metrics()))
    process.stop()
    assert eventually(lambda: process.poll() is not None)
    assert process.poll() == TRY_AGAIN
    assert "stopping at a checkpoint" in attempt.log.read_text()
    assert Run(out).checkpoint("teacher").has_last
    assert len(Run(out).metrics()) < 200


def test_ray_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # what makes `import ray` fail, installed or not
    with pytest.raises(ShoalError, match=r"pip install shoal\[sweep\]"):
        RayExecutor("local", 1, None)


class _TwoCores:
    """Ray with a cluster of two CPUs that is not there."""

    connected = False

    def init(self, **options: Any) -> None:
        self.connected = True

    def shutdown(self) -> None:
        self.connected = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}


def test_more_workers_than_the_cluster_has_cpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = _TwoCores()
    monkeypatch.setattr("shoal.sweep.cluster.load_ray", lambda: ray)
    with pytest.raises(ShoalError, match="found 3 workers for 2 CPUs"):
        RayExecutor("local", 3, None)
    assert not ray.connected


@pytest.mark.slow
@RAYS_OWN_WARNINGS
def test_a_run_on_ray_is_stopped_killed_and_loses_its_actor(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    (run, *_), killed = planned(tmp_path, PAIR), []
    with closing(RayExecutor("local", 1, None)) as place:
        (record,) = sweep(tmp_path, (run,), place, lambda: int(epochs_of(run) > 0))
        assert (record.state, record.attempts) == ("stopped", 1)
        assert "time is up" in Folder(tmp_path / "sweep").log(run).read_text()

        def lose() -> None:
            for loss in (lambda pid: os.kill(pid, signal.SIGKILL), lambda pid: ray.kill(place._actors[0])):
                before = epochs_of(run)
                if eventually(lambda n=before: epochs_of(run) > n):
                    killed.extend(pids(run.folder))
                    loss(killed[-1])
                    assert gone(killed[-1])

        thread = threading.Thread(target=lose)
        thread.start()
        (record,) = sweep(tmp_path, (run,), place)
        thread.join()
    assert (len(set(killed)), record.state, record.attempts) == (2, "finished", 4)
    assert all(gone(pid) for pid in killed)
