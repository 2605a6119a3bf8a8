"""Laws of the engine on an executor of the test's own, in which time passes by looks and nothing is a process."""

from __future__ import annotations

import io
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from shoal.errors import TRY_AGAIN, ShoalError
from shoal.sweep import engine
from shoal.sweep.engine import Record, Sweep
from shoal.sweep.folder import Folder
from shoal.sweep.grid import Planned
from shoal.sweep.processes import Attempt
from shoal.sweep.results import summary
from shoal.sweep.table import Lines, Metrics, table

LOOKS = 2
"""Polls that an attempt lasts."""


class Scripted:
    """An attempt that ends after some looks with the status that its run's script has next; 0 when that is empty."""

    def __init__(self, place: Place, name: str, attempt: Attempt) -> None:
        self.place, self.name, self.attempt, self.left = place, name, attempt, LOOKS
        self.ended: int | None = None

    def poll(self) -> int | None:
        self.left -= 1
        if self.ended is None and self.left <= 0:
            script = self.place.scripts.get(self.name, [])
            self.end(script.pop(0) if script else 0)
        return self.ended

    def end(self, status: int) -> None:
        if status == 0:
            self.attempt.result.write_text(json.dumps({"accuracy": 90.0}))
        self.ended = status
        self.place.running.discard(self.name)

    def stop(self) -> None:
        self.place.stopped.append(self.name)
        self.end(self.place.on_stop)

    def kill(self) -> None:
        self.place.killed.append(self.name)
        self.end(-9)


class Place:
    """An executor that checks that no slot is used twice and notes the order of starts."""

    def __init__(self, slots: int, scripts: dict[str, list[int]]) -> None:
        self.slots, self.scripts = slots, {name: list(script) for name, script in scripts.items()}
        self.running: set[str] = set()
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.killed: list[str] = []
        self.used: dict[int, Scripted] = {}
        self.on_stop = TRY_AGAIN

    def start(self, attempt: Attempt, slot: int) -> Scripted:
        assert 0 <= slot < self.slots
        assert slot not in self.used or self.used[slot].ended is not None
        name = attempt.log.stem
        self.running.add(name)
        assert len(self.running) <= self.slots
        self.started.append(name)
        attempt.log.write_text("first\n\nlast\n")
        self.used[slot] = Scripted(self, name, attempt)
        return self.used[slot]

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "POLL_SECONDS", 0.0)


def planned(folder: Path, name: str, *needs: str, **axes: object) -> Planned:
    return Planned(name, name[0], axes, ("train", "--out", name), needs, folder / "runs" / name)


def do(folder: Path, runs: list[Planned], place: Place, retries: int = 2, ends: Sequence[int] = (0,)) -> list[Record]:
    """A sweep; `ends` is what `asked` answers, look by look, its last item from then on."""
    looks = list(ends)
    home = Folder(folder)
    home.check(runs, resume=True)
    with home.opened(runs):
        return Sweep(home, runs, place, retries).run(asked=lambda: looks.pop(0) if len(looks) > 1 else looks[0])


STATUSES = st.sampled_from([0, 0, 0, 1, -9, TRY_AGAIN])


@given(st.integers(1, 4), st.lists(st.lists(STATUSES, max_size=4), min_size=2, max_size=8), st.integers(0, 2))
@settings(max_examples=60)
def test_every_run_ends_as_its_attempts_say(slots: int, scripts: list[list[int]], retries: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        names = [f"r{i}" for i in range(len(scripts))]
        # Each needs the one two before it: two chains.
        runs = [planned(Path(folder), n, *([names[i - 2]] if i > 1 else [])) for i, n in enumerate(names)]
        place = Place(slots, dict(zip(names, scripts, strict=True)))
        records = do(Path(folder), runs, place, retries)
    tries = Counter(place.started)
    lost, late = set[str](), set[str]()
    for name, script, record in zip(names, scripts, records, strict=True):
        endings = ([*script, 0, 0, 0])[: retries + 1]
        last = next((i for i, status in enumerate(endings) if status >= 0), retries)
        if set(record.run.needs) & lost:
            assert (record.state, tries[name]) == ("skipped", 0)
        elif set(record.run.needs) & late:
            assert (record.state, tries[name]) == ("waiting", 0)
        else:
            assert record.state == {0: "finished", TRY_AGAIN: "stopped"}.get(endings[last], "failed")
            assert record.attempts == tries[name] == last + 1
        if record.state != "finished":
            (late if record.state in ("stopped", "waiting") else lost).add(name)
        for need in record.run.needs:
            assert name not in place.started or place.started.index(need) < place.started.index(name)


def test_what_failed_is_listed_with_the_end_of_its_log(tmp_path: Path) -> None:
    runs = [planned(tmp_path, "bad"), planned(tmp_path, "later", "bad"), planned(tmp_path, "lost")]
    bad, later, lost = do(tmp_path, runs, Place(2, {"bad": [1], "lost": [-9] * 3}))
    assert (bad.state, bad.error) == ("failed", ["exit status 1", "first", "last"])
    assert (later.state, later.error) == ("skipped", ["needs bad, which did not finish"])
    assert (lost.state, lost.error[0], lost.attempts) == ("failed", "killed by signal 9, 3 times", 3)
    assert summary([bad, later, lost])["unfinished"] == ["bad", "later", "lost"]


def test_a_run_that_prints_no_result_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "end", lambda self, status: (setattr(self, "ended", 0), self.attempt.result.touch()))
    (record,) = do(tmp_path, [planned(tmp_path, "mute")], Place(1, {}))
    assert record.state == "failed"
    assert "found no JSON from run 'mute'" in record.error[0]


def test_resuming_repeats_what_failed_and_nothing_else(tmp_path: Path) -> None:
    runs = [planned(tmp_path, "a"), planned(tmp_path, "b"), planned(tmp_path, "c", "b")]
    do(tmp_path, runs, Place(1, {"b": [1]}))
    place = Place(1, {})
    again = do(tmp_path, [*runs, planned(tmp_path, "new")], place)
    assert place.started == ["b", "c", "new"]
    assert [r.state for r in again] == ["finished"] * 4
    assert again[0].result == {"accuracy": 90.0}


def test_an_end_asked_for_once_stops_and_twice_kills(tmp_path: Path) -> None:
    runs = [planned(tmp_path, n) for n in "abc"]
    place = Place(2, {})
    records = do(tmp_path / "once", runs, place, ends=[0, 1])
    assert (place.started, sorted(place.stopped), place.killed) == (["a", "b"], ["a", "b"], [])
    assert [r.state for r in records] == ["stopped", "stopped", "waiting"]
    place = Place(2, {})
    records = do(tmp_path / "twice", runs, place, ends=[0, 2])
    assert sorted(place.killed) == ["a", "b"]
    assert [r.state for r in records] == ["stopped", "stopped", "waiting"]


@pytest.mark.parametrize(
    ("status", "state"), [(TRY_AGAIN, "stopped"), (-15, "stopped"), (0, "finished"), (1, "failed")]
)
def test_a_stop_hides_no_failure(status: int, state: str, tmp_path: Path) -> None:
    place = Place(1, {})
    place.on_stop = status
    (record,) = do(tmp_path, [planned(tmp_path, "a")], place, ends=[0, 1])
    assert (record.state, place.started) == (state, ["a"])


def test_workers_are_killed_when_the_sweep_itself_breaks(tmp_path: Path) -> None:
    place, home, runs = Place(2, {}), Folder(tmp_path), [planned(tmp_path, n) for n in "ab"]

    def broken(records: object) -> None:
        raise OSError("no terminal")

    with home.opened(runs), pytest.raises(OSError, match="no terminal"):
        Sweep(home, runs, place).run(watch=broken)
    assert sorted(place.killed) == ["a", "b"]


def test_a_folder_is_one_sweeps(tmp_path: Path) -> None:
    home, runs = Folder(tmp_path), [planned(tmp_path, "a")]
    with home.opened(runs), pytest.raises(ShoalError, match="another sweep at work"), Folder(tmp_path).opened(runs):
        pass
    with pytest.raises(ShoalError, match="need --resume"):
        home.check(runs, resume=False)
    other = Planned("a", "a", {}, ("train", "--out", "b"), (), tmp_path)
    with pytest.raises(ShoalError, match="run 'a' made with other options"):
        home.check([other], resume=True)
    for words in (("train", "--shard-mb", "15", "--out", "a"), ("train", "--out", "a", "--shard-mb", "2")):
        home.check([Planned("a", "a", {}, words, (), tmp_path)], resume=True)
    for words in (("train", "--device", "cuda", "--out", "a"), ("train", "--out", "a", "--save-seconds", "9")):
        home.check([Planned("a", "a", {}, words, (), tmp_path)], resume=True)
    home.check([*runs, planned(tmp_path, "new")], resume=True)
    (tmp_path / "results" / "a.json").write_text("{}")
    with pytest.raises(ShoalError, match="found no result in"):
        do(tmp_path, runs, Place(1, {}))


def test_a_sweep_may_move_but_not_its_runs_within_it(tmp_path: Path) -> None:
    def reduction(place: str, teacher: str = "t") -> Planned:
        words = ("reduce", "--out", f"{place}/runs/a", "--budget", "9", "--", f"{place}/runs/{teacher}")
        return Planned("a", "a", {}, words, (), tmp_path)

    home = Folder(tmp_path)
    with home.opened([reduction("/here/sweep")]):
        pass
    for place in ("/there/sweep", "sweep", "."):
        home.check([reduction(place)], resume=True)
    for other in (reduction("/here/sweep", "u"), replace(reduction("there"), words=reduction("here").words[:-1])):
        with pytest.raises(ShoalError, match="run 'a' made with other options"):
            home.check([other], resume=True)


def finished(folder: Path, seed: int, budget: int, accuracy: float) -> Record:
    run = planned(folder, f"r{seed}{budget}", seed=seed, budget=budget)
    body = {"seed": seed, "data": "digits", "environment": {"cores": 2}, "baseline": {"accuracy": 95.0}}
    body["reduced"] = {"accuracy": accuracy, "relus": budget, "ok": True}
    return Record(run, "finished", 1, 2.0, body)


def test_mean_and_sample_deviation_by_hand(tmp_path: Path) -> None:
    records = [finished(tmp_path, s, 300, a) for s, a in ((0, 90.0), (1, 92.0), (2, 97.0))]
    records += [finished(tmp_path, 0, 600, 80.0), Record(planned(tmp_path, "r1600", seed=1, budget=600), "failed", 1)]
    body = summary(records)
    first, second = body["groups"]
    assert first["mean"]["reduced.accuracy"] == pytest.approx(93.0)
    assert first["sd"]["reduced.accuracy"] == pytest.approx(13**0.5)  # (9 + 1 + 16) / (3 - 1)
    assert first["sd"]["reduced.accuracy"] == pytest.approx(statistics.stdev([90, 92, 97]))
    assert (first["seeds"], first["runs"], first["axes"]) == ([0, 1, 2], 3, {"budget": 300})
    assert (second["seeds"], second["sd"]["reduced.accuracy"]) == ([0], None)
    assert set(first["mean"]) == {"baseline.accuracy", "reduced.accuracy", "reduced.relus", "seconds"}
    assert body["unfinished"] == ["r1600"]
    assert json.loads(json.dumps(body)) == body


def test_the_table_shows_what_runs_first_and_fits(tmp_path: Path) -> None:
    records = [Record(planned(tmp_path, f"w{i}")) for i in range(30)]
    running = Record(planned(tmp_path, "busy"), "running", 2)
    running.run.folder.mkdir(parents=True)
    row = {"stage": "mask", "epoch": 3, "accuracy": 71.25}
    (running.run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    console = Console(width=100, height=16, record=True, file=io.StringIO())
    console.print(table([*records, running], Metrics(), console.height))
    lines = console.export_text().splitlines()
    assert len(lines) <= 16
    first = next(line for line in lines if "busy" in line)
    assert [word for word in first.split() if word.isalnum() or "." in word][1:5] == ["running", "mask", "4", "71.25"]
    assert "1 running, 30 waiting" in lines[0]
    assert "and 21 more runs" in lines[-1]


def test_lines_tell_each_change_once(tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    lines, record = Lines(console), Record(planned(tmp_path, "a"))
    for state, attempts in (("waiting", 0), ("running", 1), ("running", 1), ("running", 2), ("failed", 2)):
        record.state, record.attempts = state, attempts
        lines.watch([record])
    told = console.export_text().splitlines()
    assert told == ["running a", "running a, attempt 2", "failed a, attempt 2, 0 s"]
