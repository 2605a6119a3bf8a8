"""Attempts at runs as processes on this machine, and how they share its cores and GPUs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shoal.errors import ShoalError

START = "from shoal.sweep.worker import main; main()"
"""Program of a worker's process."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run: the command line after `shoal`, the log to append to, and the file for its JSON."""

    words: tuple[str, ...]
    log: Path
    result: Path


class Worker(Protocol):
    """A running attempt, on any machine."""

    def poll(self) -> int | None:
        """None while it runs, then its exit status; -N when signal N killed it, and -9 when its machine was lost."""

    def stop(self) -> None:
        """Ask it to stop at its next checkpoint."""

    def kill(self) -> None:
        """Kill it immediately; its last checkpoint stays."""


class Executor(Protocol):
    """Runs up to `slots` attempts at once."""

    slots: int

    def start(self, attempt: Attempt, slot: int) -> Worker:
        """Start an attempt in a free slot. Raises ShoalError when that fails."""

    def close(self) -> None:
        """Release all resources."""


class Process:
    """An attempt as a process with its own process group, so that Ctrl-C reaches only the sweep.

    Raises ShoalError when its log or its result cannot be written.
    """

    def __init__(self, attempt: Attempt, environment: Mapping[str, str], folder: str | None = None) -> None:
        try:
            with attempt.log.open("ab") as log, attempt.result.open("wb") as result:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", START, *attempt.words],
                    stdin=subprocess.PIPE,  # held open as long as this process lives; see worker.py
                    stdout=result,
                    stderr=log,
                    env={**os.environ, **environment},
                    cwd=folder,
                    start_new_session=True,
                )
        except OSError as error:
            raise ShoalError(
                f"found no place for a log at {attempt.log} ({error}); need the sweep's folder, the same one on every "
                "machine of a cluster; share it, or choose another --out"
            ) from error

    def poll(self) -> int | None:
        status = self.process.poll()
        if status is not None and self.process.stdin is not None:
            self.process.stdin.close()
        return status

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.poll()


def assign(slot: int, gpus: Sequence[str]) -> dict[str, str]:
    """The environment that gives a slot its GPU. Slots take the GPUs in turn, so that a few runs use all of them.

    >>> [assign(slot, ["0", "1"])["CUDA_VISIBLE_DEVICES"] for slot in range(4)]
    ['0', '1', '0', '1']
    """
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}


def visible_gpus(environment: Mapping[str, str], found: int) -> list[str]:
    """Names of the GPUs that this process may use: those in CUDA_VISIBLE_DEVICES, or the numbers of all `found`."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(i) for i in range(found)]
    return [name.strip() for name in named.split(",") if name.strip()]


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(total: int, workers: int) -> dict[str, str]:
    """The environment that gives each of `workers` its share of `total` cores, at least one.

    PyTorch, MKL and OpenBLAS read OMP_NUM_THREADS. With more threads than cores, they would wait for each other.
    """
    return {"OMP_NUM_THREADS": str(max(1, total // workers))}


def count_slots(workers: int | None, per_gpu: int | None, gpus: int, default: int) -> int:
    """Number of attempts at once: `workers`, or `per_gpu` on each of `gpus` devices, or `default`.

    Raises ShoalError for numbers below 1, for `per_gpu` without a GPU, and for more workers than places on GPUs.
    """
    for name, value in (("--workers", workers), ("--per-gpu", per_gpu)):
        if value is not None and value < 1:
            raise ShoalError(f"found {name} {value}; need 1 or more; leave it out for the default")
    if per_gpu is None:
        return workers or default
    if gpus == 0:
        raise ShoalError("found --per-gpu and no GPU that PyTorch or Ray may use; need one; leave it out for CPU runs")
    places = per_gpu * gpus
    if workers is not None and workers > places:
        raise ShoalError(
            f"found --workers {workers} for {places} places ({gpus} GPUs, {per_gpu} runs each); need at most {places}; "
            "raise --per-gpu"
        )
    return workers or places


class LocalExecutor:
    """Runs attempts as processes on this machine. `slots` of them share its cores and take its GPUs in turn."""

    def __init__(self, slots: int, gpus: Sequence[str] = ()) -> None:
        self.slots, self.gpus = slots, list(gpus)

    def start(self, attempt: Attempt, slot: int) -> Worker:
        return Process(attempt, share(cores(), self.slots) | assign(slot, self.gpus))

    def close(self) -> None:
        """Nothing to release."""
