"""Progress: lines without a terminal, bars on one, nothing when quiet, and no reading of tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shoal.progress import bars, counter, say, set_verbosity, status, timeline


@pytest.fixture(autouse=True)
def normal() -> Iterator[None]:
    yield
    set_verbosity(0)


def train(epochs: int = 2, steps: int = 3, first: int = 0) -> None:
    with bars({"teacher": epochs}) as shown:
        for epoch in range(first, epochs):
            for step in range(steps):
                shown.listen("teacher", epoch, step, steps)
            row = {"epoch": epoch, "loss": 0.51234, "accuracy": 91.2, "seconds": 4.0}
            shown.judged("teacher", row)


def everything() -> None:
    train()
    with counter("items", 8) as advance:
        advance(8, 8)
    with timeline({"items": 2.0, "queries": 1.0}) as begin:
        begin("items")
    with status() as tell:
        tell("searching")
    say("training")


def test_without_a_terminal_an_epoch_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    train()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("teacher: epoch 1 of 2, loss 0.512, validation accuracy 91.20 %, 4.00 s")
    assert "left" not in lines[1]


def test_a_resumed_stage_counts_from_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    train(epochs=5, first=3)
    assert [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "teacher: epoch 4 of 5",
        "teacher: epoch 5 of 5",
    ]


def test_without_a_terminal_a_counter_is_one_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with counter("items", 8) as advance:
        for done in range(1, 9):
            advance(done, 8)
    assert capsys.readouterr().err.startswith("items: 8 of 8 in ")


def test_without_a_terminal_a_timeline_says_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step begins after twice the typical seconds of the first, so the rest takes twice as long, too."""
    now = [100.0]
    monkeypatch.setattr("shoal.progress.time.monotonic", lambda: now[0])
    with timeline({"items": 40.0, "queries": 10.0}) as begin:
        begin("items")
        now[0] = 180.0
        begin("queries")
    assert capsys.readouterr().err.splitlines() == [
        "items (1 of 2), about 50 s left",
        "queries (2 of 2), about 20 s left",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_shows_nothing(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    set_verbosity(-1)
    everything()
    assert capsys.readouterr() == ("", "")


def test_other_processes_of_torchrun_show_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    everything()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_epoch_loss_and_accuracy_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    train()
    shown = capsys.readouterr()
    assert shown.out == ""
    for part in ("teacher", "2/2", "loss 0.512", "accuracy 91.20 %", "left"):
        assert part in shown.err


def test_verbose_keeps_every_line_of_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    set_verbosity(1)
    with status() as tell:
        tell("first")
        tell("second")
    assert capsys.readouterr().err.splitlines() == ["first", "second"]
