"""Attempts of a sweep as forks of one process that has all imports: the same command, started in milliseconds.

The processes that a sweep really starts are tested through the command line and on Ray.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from shoal.sweep.processes import Attempt, Worker
from tests.support.forked import FORKS, heard

IMPORTS = ("torch._dynamo", "sklearn.datasets", "matplotlib.pyplot", "shoal.cli.train", "shoal.cli.reduce")


class Forked:
    """An executor of two slots, each with one thread."""

    slots = 2

    def __init__(self) -> None:
        self.pids: dict[str, int] = {}
        """Of the last attempt at each run, by the run's name."""

    def start(self, attempt: Attempt, slot: int) -> Worker:
        fork = _Fork(attempt)
        self.pids[attempt.log.stem] = fork.pid
        return fork

    def close(self) -> None:
        """Nothing to release: all share one template."""


class _Fork:
    def __init__(self, attempt: Attempt) -> None:
        self.pid = int(_ask(attempt) or 0)
        self.ended: int | None = None

    def poll(self) -> int | None:
        if self.ended is None:
            self.ended = _ask(self.pid)
        return self.ended

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _ask(question: Attempt | int) -> int | None:
    pipe = _template()
    pipe.send(question)
    answer: int | None = heard(pipe)
    return answer


@functools.cache
def _template() -> Connection:
    """The pipe to the process that is forked; it ends with this one."""
    mine, theirs = FORKS.Pipe()
    FORKS.Process(target=_fork_when_asked, args=(theirs,), daemon=True).start()
    theirs.close()
    return mine


def _fork_when_asked(pipe: Connection) -> None:
    """Answers an attempt with the process that runs it, and the number of a process with its status or None."""
    for name in IMPORTS:
        importlib.import_module(name)
    with contextlib.suppress(EOFError):
        while True:
            question = pipe.recv()
            if isinstance(question, int):
                pid, status = os.waitpid(question, os.WNOHANG)
                pipe.send(os.waitstatus_to_exitcode(status) if pid else None)
            elif pid := os.fork():
                pipe.send(pid)
            else:
                pipe.close()
                _run(question)


def _run(attempt: Attempt) -> None:
    """What a worker's process does: the command, with its log and its JSON in their files."""
    _redirect(attempt.log, os.O_APPEND, sys.stderr.fileno())
    _redirect(attempt.result, os.O_TRUNC, sys.stdout.fileno())
    torch.set_num_threads(1)
    sys.argv = ["shoal", *attempt.words]
    from shoal.cli.app import main

    main()


def _redirect(path: Path, how: int, descriptor: int) -> None:
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o644)
    os.dup2(opened, descriptor)
    os.close(opened)
