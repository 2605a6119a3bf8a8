"""Attempts on a Ray cluster. An actor holds a slot and its share of a machine, and runs each attempt as a process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.sweep.processes import Attempt, Process, Worker, cores, count_slots, share

LOST = -9
"""Exit status of an attempt whose actor or machine is gone, the same as after a kill."""
STORE_BYTES = 80 * 2**20
"""Size of Ray's object store. Only words and exit statuses go through it."""


def load_ray() -> Any:
    """The `ray` module. Raises ShoalError when it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ShoalError("found no Ray; need it for --ray; pip install shoal[sweep]") from error
    return ray


class Slot:
    """The actor that Ray runs on a machine of the cluster. It runs one attempt after another."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.process: Process | None = None

    def start(self, words: list[str], log: str, result: str, folder: str) -> None:
        """Start an attempt in `folder`.

        Raises ShoalError when this machine does not share `folder` or the sweep's folder.
        """
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
    """The driver's handle of an attempt in an actor. It calls `lost` when the actor is gone."""

    def __init__(self, ray: Any, actor: Any, attempt: Attempt, lost: Callable[[], None]) -> None:
        self.ray, self.actor, self.lost = ray, actor, lost
        place = str(attempt.log.resolve()), str(attempt.result.resolve())
        self.killed = False
        self._started = actor.start.remote(list(attempt.words), *place, os.getcwd())
        self._asked = actor.poll.remote()  # ready once the actor runs, which may take a while on a busy cluster

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
        """Kill the actor, which may still wait for resources; its attempt ends with it."""
        self.killed = True
        self.lost()


class RayExecutor:
    """`slots` actors on a cluster, each with `threads` of its CPUs and, with `per_gpu`, a part of a GPU.

    The sweep's folder and the current folder must have the same paths on every machine (a shared file system), and
    shoal must be installed there. A slot whose machine is lost gets a new actor where there is room. Raises ShoalError
    when there is no cluster at `address`, or it has too few CPUs or GPUs.
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
                f"found {self.slots} workers for {cpus} CPUs of the cluster; need 1 to {cpus}; choose another --workers"
            )
        self.threads, self.per_gpu = self._share(cpus // self.slots, per_gpu), per_gpu
        self._actors: dict[int, Any] = {}

    def _share(self, most: int, per_gpu: int | None) -> int:
        """Number of CPUs per slot, so that each actor fits on one machine. Raises ShoalError when they do not fit."""
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        for threads in range(most, 0, -1):
            places = [int(m.get("CPU", 0)) // threads for m in machines]
            if per_gpu is not None:
                gpus = [per_gpu * int(m.get("GPU", 0)) for m in machines]
                places = [min(pair) for pair in zip(places, gpus, strict=True)]
            if sum(places) >= self.slots:
                return threads
        self.close()
        raise ShoalError(
            f"found no room for {self.slots} workers on the cluster's machines; need fewer; lower --workers"
        )

    def _connect(self, address: str) -> None:
        # By default Ray sends usage statistics to its developers. That does not suit a toolkit for private inference.
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
        """Kill the slot's actor, so that its attempt cannot come back, and let the slot get another one."""
        actor = self._actors.pop(slot, None)
        if actor is not None:
            self.ray.kill(actor)

    def close(self) -> None:
        """Disconnect from the cluster, which ends the actors. A local cluster is shut down."""
        self.ray.shutdown()
