"""The command that trains a network. `app` gives it its name."""

from __future__ import annotations

from shoal.cli.options import Json, pairs, show, trains
from shoal.jobs import train as job
from shoal.jobs.inputs import Shared


@trains
def train(request: job.Request, *, shared: Shared, json: Json = False) -> None:
    """Train a network with all of its ReLUs: the teacher of a reduction, or a baseline.

    On several GPUs or in several processes: torchrun --nproc-per-node=N -m shoal train ...
    """
    body = job.train(request, shared)
    show(body, json, lambda: pairs(f"{request.model} on {request.data}", body))
