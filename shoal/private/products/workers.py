"""Workers: where the tasks of SEAL's products run. The binding holds Python's lock, so threads would gain nothing.

All kinds of workers have one interface: `call` runs a method of the worker's task, whose arguments and results are
arrays and bytes, and blocks until it is done.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Protocol

from shoal.errors import ShoalError

MOST_BY_DEFAULT = 4
RAY = "ray"
_START = "from shoal.private.products.workers import main; main()"


class Worker(Protocol):
    """One place where a task runs. It runs one call at a time."""

    def call(self, method: str, *arguments: Any) -> Any:
        """The result of the task's `method`. ``build`` comes first: it makes the task, from its name and arguments."""

    def memory(self) -> int:
        """Peak memory of a process of its own, in bytes; 0 where the worker is in this process or elsewhere."""

    def close(self) -> None:
        """End the worker."""


class Desk:
    """A worker in this process; also what a process or an actor runs."""

    def __init__(self) -> None:
        self.task: Any = None

    def call(self, method: str, *arguments: Any) -> Any:
        """See Worker."""
        if method == "memory":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if method == "build":
            # Here, because whoever only reads options must not need SEAL.
            from shoal.private.products.tasks import TASKS

            self.task = TASKS[arguments[0]](*arguments[1:])
            return None
        return getattr(self.task, method)(*arguments)

    def memory(self) -> int:
        """See Worker."""
        return 0

    def close(self) -> None:
        """See Worker."""


class Process:
    """A worker in a process of its own, which ends when this process ends: the pipe between them is then closed."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                # Not -m: the package has imported this module already.
                [sys.executable, "-c", _START, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                stdin=subprocess.DEVNULL,
            )
        self.pipe = Connection(ours.detach())

    def call(self, method: str, *arguments: Any) -> Any:
        """See Worker. Raises ShoalError for the task's own errors, and when the process is gone."""
        try:
            self.pipe.send((method, *arguments))
            sound, result = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise ShoalError(
                f"found worker process {self.process.pid} of the products dead ({error!r}); need it alive; look for "
                "lack of memory"
            ) from error
        if not sound:
            raise ShoalError(result)
        return result

    def memory(self) -> int:
        """See Worker."""
        return int(self.call("memory"))

    def close(self) -> None:
        """See Worker."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self.pipe.close()


def main() -> None:
    """Entry point of a worker process. Its only argument is the number of the inherited socket."""
    # Ctrl-C reaches the whole foreground; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe, desk = Connection(int(sys.argv[1])), Desk()
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, *arguments = pipe.recv()
            try:
                pipe.send((True, desk.call(method, *arguments)))
            except ShoalError as error:
                pipe.send((False, str(error)))
            except (MemoryError, RuntimeError, ValueError) as error:
                pipe.send((False, f"found {type(error).__name__} in a worker process of the products: {error}"))


class Crew:
    """Workers of one task. Calls of one worker run in order, those of different workers at the same time."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)
        self._queues = [ThreadPoolExecutor(1, "products") for _ in self.workers]

    def __len__(self) -> int:
        return len(self.workers)

    def submit(self, at: int, method: str, *arguments: Any) -> Future[Any]:
        """Queue a call at worker `at`."""
        return self._queues[at].submit(self.workers[at].call, method, *arguments)

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call `method` at the first workers, one for each entry of `arguments`; returns all results."""
        calls = [self.submit(at, method, *given) for at, given in enumerate(arguments)]
        return [call.result() for call in calls]

    def memory(self) -> int:
        """Peak memory of all workers that are processes of their own, in bytes."""
        calls = [queue.submit(worker.memory) for queue, worker in zip(self._queues, self.workers, strict=True)]
        return sum(call.result() for call in calls)

    def close(self) -> None:
        """End all workers. Calls that are queued are dropped."""
        for worker in self.workers:
            worker.close()
        for queue in self._queues:
            queue.shutdown(wait=False, cancel_futures=True)


def usual_workers() -> int:
    """How many workers a party starts unless told otherwise: one for each core, at most MOST_BY_DEFAULT."""
    return max(1, min(MOST_BY_DEFAULT, os.cpu_count() or 1))


def hire(workers: str) -> Crew:
    """As many workers as the text `workers` says; a single one runs in this process. ``ray``: actors of a cluster."""
    if workers == RAY:
        from shoal.private.products.cluster import actors

        return Crew(actors())
    make: Callable[[], Worker] = Desk if workers == "1" else Process
    return Crew([make() for _ in range(int(workers))])
