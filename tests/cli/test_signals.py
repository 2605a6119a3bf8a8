"""Signals while training: the first asks for a stop at a checkpoint, a second Ctrl-C ends the program at once."""

from __future__ import annotations

import signal
import threading

import pytest

from shoal.cli.signals import until_stopped


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_at_once_and_the_first_signal_does_not(
    first: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with until_stopped() as stop:
        assert not stop()
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGTERM)  # schedulers repeat it; it never ends a program at once
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert capfd.readouterr().err == "shoal: stopping at a checkpoint; Ctrl-C again ends at once\n"


def test_another_thread_than_the_main_one_leaves_signals_as_they_are() -> None:
    seen: list[object] = []

    def work() -> None:
        with until_stopped() as stop:
            seen.extend((stop(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, before]
