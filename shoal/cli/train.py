"""`shoal train`."""

from __future__ import annotations

from shoal.cli.options import Json, pairs, show, trains
from shoal.jobs import train as job
from shoal.jobs.options import Shared


@trains
def train(request: job.Request, *, shared: Shared, json: Json = False) -> None:
    """Train a network with all of its ReLUs: the teacher of a reduction, or a baseline.

    Example: shoal train resnet18 --data cifar100 --data-dir DATA --out runs/teacher

    On several GPUs or in several processes: torchrun --nproc-per-node=N -m shoal train ...
    """
    body = job.train(request, shared)
    show(body, json, lambda: pairs(f"{request.model} on {request.data}", body))
