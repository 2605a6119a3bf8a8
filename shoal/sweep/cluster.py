"""Attempts on a Ray cluster: an actor holds a slot and its share of a machine, and runs each attempt as a process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.sweep.processes import Attempt, Process, Worker, cores, count_slots, share

LOST = -9
"""The exit status of an attempt whose actor or machine is gone: as if it had been killed."""
STORE_BYTES = 80 * 2**20
"""Ray's object store; nothing but words and exit statuses goes through it."""


def load_ray() -> Any:
    """The module. Raises ShoalError when it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ShoalError("found no Ray; need it for --ray; pip install shoal[sweep]") from error
    return ray


class Slot:
    """What Ray runs on a machine of the cluster: one attempt after another."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.process: Process | None = None

    def start(self, words: list[str], log: str, result: str, folder: str) -> None:
        """Begin an attempt in `folder`. Raises ShoalError where that or the sweep's is not shared with this machine."""
        self.process = Process(Attempt(tuple(words), Path(log), Path(result)), share(self.threads, 1), folder)

    def poll(self) -> int | None:
        """See `Worker.poll`."""
        return self._running().poll()

    def stop(self) -> None:
        """See `Worker.stop`."""
        self._running().stop()

    def kill(self) -> None:
        """See `Worker.kill`."""
        self._running().kill()

    def _running(self) -> Process:
        if self.process is None:
            raise ShoalError("found a slot without an attempt; need one that was started; start the sweep again")
        return self.process


class Remote:
    """The driver's handle of an attempt in an actor; `lost` is called when the actor turns out to be gone."""

    def __init__(self, ray: Any, actor: Any, attempt: Attempt, lost: Callable[[], None]) -> None:
        self.ray, self.actor, self.lost = ray, actor, lost
        place = str(attempt.log.resolve()), str(attempt.result.resolve())
        self.killed = False
        self._started = actor.start.remote(list(attempt.words), *place, os.getcwd())
        self._asked = actor.poll.remote()  # answered once the actor runs, which may take a busy cluster a while

    def poll(self) -> int | None:
        if self.killed:
            return LOST
        ready, _ = self.ray.wait([self._asked], timeout=0)
        if not ready:
            return None
        try:
            self.ray.get(self._started)
            status: int | None = self.ray.get(self._asked)
        except self.ray.exceptions.RayActorError:
            self.lost()
            return LOST
        except self.ray.exceptions.RayTaskError as error:
            raise ShoalError(f"found that an attempt did not start on the cluster: {error.cause}") from error
        if status is None:
            self._asked = self.actor.poll.remote()
        return status

    def stop(self) -> None:
        self.actor.stop.remote()

    def kill(self) -> None:
        """End the actor itself, which may still wait for a place: its attempt ends with it."""
        self.killed = True
        self.lost()


class RayExecutor:
    """`slots` actors of a cluster, each with `threads` of its CPUs and, with `per_gpu`, a part of a GPU.

    The sweep's folder and the current one must be the same path on every machine (a shared file system), and shoal
    must be installed there. A slot whose machine is lost gets a new actor where there is room.
    """

    def __init__(self, address: str, workers: int | None, per_gpu: int | None) -> None:
        self.ray = load_ray()
        self._connect(address)
        found = self.ray.cluster_resources()
        cpus, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
        self.slots = count_slots(workers, per_gpu, gpus, cpus)
        if not 1 <= self.slots <= cpus:
            self.close()
            raise ShoalError(
                f"found {self.slots} workers for {cpus} CPUs of the cluster; need 1 to {cpus}; ask for less"
            )
        self.threads, self.per_gpu = self._share(cpus // self.slots, per_gpu), per_gpu
        self._actors: dict[int, Any] = {}

    def _share(self, most: int, per_gpu: int | None) -> int:
        """CPUs of each slot: an actor lies on one machine, and all of them must find a place. Raises ShoalError."""
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        for threads in range(most, 0, -1):
            places = [int(m.get("CPU", 0)) // threads for m in machines]
            if per_gpu is not None:
                gpus = [per_gpu * int(m.get("GPU", 0)) for m in machines]
                places = [min(pair) for pair in zip(places, gpus, strict=True)]
            if sum(places) >= self.slots:
                return threads
        self.close()
        raise ShoalError(f"found no room for {self.slots} workers on the cluster's machines; need less; set --workers")

    def _connect(self, address: str) -> None:
        # Ray tells its makers of each use unless told not to; what this toolkit is for calls for silence.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        try:
            if address == "local":
                size = {"num_cpus": cores(), "object_store_memory": STORE_BYTES}
                self.ray.init(address="local", include_dashboard=False, **size, **quiet)
            else:
                self.ray.init(address=address, **quiet)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise ShoalError(
                f"found no Ray cluster at {address!r} ({error}); need host:port of its head, or local; start one with "
                "`ray start --head`"
            ) from error

    def start(self, attempt: Attempt, slot: int) -> Worker:
        if slot not in self._actors:
            self._actors[slot] = self._actor()
        return Remote(self.ray, self._actors[slot], attempt, lambda: self._forget(slot))

    def _actor(self) -> Any:
        part = 1 / self.per_gpu if self.per_gpu else 0
        return self.ray.remote(Slot).options(num_cpus=self.threads, num_gpus=part).remote(self.threads)

    def _forget(self, slot: int) -> None:
        """Let the slot have another actor; this one must not come back with its attempt."""
        actor = self._actors.pop(slot, None)
        if actor is not None:
            self.ray.kill(actor)

    def close(self) -> None:
        """End the actors and leave the cluster; a local one ends."""
        self.ray.shutdown()
