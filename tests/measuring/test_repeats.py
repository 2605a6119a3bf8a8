"""Repeated measurements: narrow ones are made once, wide ones again, and a busy machine is named as such."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from shoal.costs.machine import Machine
from shoal.errors import ShoalWarning
from shoal.jobs.costs import Calibration, calibrate
from shoal.measuring import calibration
from shoal.measuring.repeats import ROUNDS, WIDE, Laps, busy, repeated, spread
from shoal.report.labels import LABELS

CALM, RESTLESS, WILD = (1.0, 1.01, 1.0, 0.99, 1.0), (1.0, 1.5, 1.2, 2.0, 1.0), (1.0, 9.0, 1.0, 9.0, 1.0)
ROWS = [
    ([CALM], CALM, 1),
    ([RESTLESS, CALM], CALM, 2),
    ([WILD, RESTLESS, CALM], CALM, 3),
    ([WILD, RESTLESS, WILD], RESTLESS, 3),
]


@pytest.mark.parametrize(("rounds", "kept", "made"), ROWS)
def test_wide_measurements_are_repeated_and_the_least_spread_counts(
    rounds: list[tuple[float, ...]], kept: tuple[float, ...], made: int
) -> None:
    waiting = iter([*rounds, CALM])
    found = repeated(lambda: next(waiting), most=3)
    assert (found.seconds, found.rounds) == (kept, made)
    assert found.spread == spread(kept)


def test_a_spread_is_relative_and_one_outlier_does_not_count() -> None:
    assert spread([10 * s for s in RESTLESS]) == pytest.approx(spread(RESTLESS))
    assert spread([*CALM, *CALM, 50.0]) < WIDE < spread(RESTLESS) < spread(WILD)
    assert spread([1.0, 1.5]) == pytest.approx(0.4)
    assert spread([2.0]) == spread([0.0, 0.0]) == 0.0


@pytest.mark.parametrize(("ends", "few"), [([9], True), ([9, 10], True), ([9, 10, 11], False), ([0, 1, 4], True)])
def test_laps_go_on_until_two_agree(ends: list[float], few: bool) -> None:
    laps = Laps()
    laps.ends = list(ends)
    assert laps.are_few() is few
    assert laps.seconds == [b - a for a, b in itertools.pairwise(ends)]
    assert not laps.seconds or laps.seconds[laps.fastest] == min(laps.seconds)


def test_a_busy_machine_is_named_with_its_load() -> None:
    assert busy({"a": WIDE, "b": 0.0}) is None
    said = busy({"a": 0.1, "b": 0.5, "c": 0.9})
    assert said is not None
    assert said.startswith(f"found a busy machine: 2 of 3 measurements still vary after {ROUNDS} rounds, 'c' by 90 %")
    assert "load average" in said


@pytest.mark.parametrize("wide", [False, True])
def test_calibrate_writes_its_constants_and_warns_if_they_vary(
    wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(say: calibration.Say) -> tuple[Machine, calibration.Measurements]:
        for name in calibration.STEPS:
            say(name)
        spreads = {"items with SPU": 0.1, "queries: deep": 0.6 if wide else 0.2}
        return Machine(), calibration.Measurements(offline={}, queries={}, spreads=spreads)

    monkeypatch.setattr(calibration, "calibrate", measured)
    wanted = Calibration(tmp_path / "machine.json")
    if wide:
        with pytest.warns(ShoalWarning, match="busy machine"):
            body = calibrate(wanted)
    else:
        body = calibrate(wanted)  # warnings are errors
    assert body["spread"] == (0.6 if wide else 0.2)
    assert body.keys() <= LABELS.keys()
    assert Machine.load(wanted.out) == Machine()
    lines = capsys.readouterr().err.splitlines()[: len(calibration.STEPS)]
    assert [line.partition(" (")[0] for line in lines] == list(calibration.STEPS)
    assert all(line.endswith(" left") for line in lines)
