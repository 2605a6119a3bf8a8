"""Workers as actors of a Ray cluster, for a server whose machine is too small.

The cluster's machines get the server's weights and must be as trustworthy as the server; Ray's own connections are only
encrypted if Ray is told so (RAY_USE_TLS). shoal must be installed on all of them.
"""

from __future__ import annotations

import os
from typing import Any

from shoal.errors import ShoalError
from shoal.private.products.workers import Desk, Worker, usual_workers

MOST_ACTORS = 16
"""Each worker loads all ciphertexts of a message, so more would gain little."""
STORE_BYTES = 512 << 20
"""Size of a local cluster's object store, through which ciphertexts and answers go."""


def actors(most: int = MOST_ACTORS) -> list[Worker]:
    """An actor for each CPU of the cluster at RAY_ADDRESS, or of a local one where that is not set; at most `most`.

    Raises ShoalError when Ray is not installed, and when there is no cluster at that address.
    """
    try:
        import ray
    except ImportError as error:
        raise ShoalError("found no Ray; need it for --workers ray; pip install shoal[sweep]") from error
    _connect(ray, os.environ.get("RAY_ADDRESS", "local"), min(most, usual_workers()))
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < 1:
        raise ShoalError("found no CPU in the Ray cluster; need one or more; start a node")
    return [Actor(ray) for _ in range(min(cpus, most))]


def _connect(ray: Any, address: str, cpus: int) -> None:
    # By default Ray sends usage statistics to its developers. That does not suit private inference.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {"num_cpus": cpus, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    try:
        if not ray.is_initialized():
            ray.init(address=address, logging_level="ERROR", log_to_driver=False, **(own if address == "local" else {}))
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ShoalError(
            f"found no Ray cluster at {address!r} ({error}); need host:port of its head in RAY_ADDRESS; start one with "
            "`ray start --head`"
        ) from error


class Actor:
    """A worker in an actor that holds one CPU of the cluster."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self.actor = ray.remote(Desk).options(num_cpus=1).remote()

    def call(self, method: str, *arguments: Any) -> Any:
        """See Worker. Raises ShoalError for the task's own errors, and when the actor or its machine is gone."""
        try:
            return self.ray.get(self.actor.call.remote(method, *arguments))
        except self.ray.exceptions.RayTaskError as error:
            raise ShoalError(f"found an error in an actor of the products: {error.cause}") from error
        except self.ray.exceptions.RayActorError as error:
            raise ShoalError(
                "found an actor of the products gone; need it alive; look at the cluster and prepare again"
            ) from error

    def memory(self) -> int:
        """See Worker."""
        return 0

    def close(self) -> None:
        """See Worker."""
        self.ray.kill(self.actor)
