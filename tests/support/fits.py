"""Small fits that tests of training share."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from shoal.reduction.budget import allocate
from shoal.reduction.masks import add_masks, masked_sites, random_masks
from shoal.storage.checkpoint import Checkpoint
from shoal.surgery.sites import relu_sites
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.conftest import Residual, blobs
from tests.support.forked import forked, heard
from tests.support.waiting import HANG

ROOT = Path(__file__).parents[2]
SHAPE = (1, 8, 8)
DATA = blobs(256)


def network() -> torch.nn.Module:
    torch.manual_seed(3)
    return Residual()


OBJECTIVE = Objective((cross_entropy(),))
PLAN = Schedule(4, 0.1, (3,), batch_size=16)


def weights_after(folder: Path | None, plan: Schedule, **options: Any) -> dict[str, torch.Tensor]:
    model = network()
    checkpoint = Checkpoint(folder) if folder else None
    fit(model, DATA, OBJECTIVE, plan, settings=Settings(**options), checkpoint=checkpoint)
    return model.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def full(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(m.mask) for name, m in masked_sites(student).items()}


def masked() -> tuple[Any, Any]:
    model = network()
    sites = relu_sites(model, SHAPE)
    budget = allocate(sites, {s.name: 1.0 for s in sites}, 100)
    return add_masks(model, random_masks(budget, sites, torch.Generator().manual_seed(0))), budget


def kill_in_the_middle(train: Callable[..., object], *arguments: Any) -> None:
    """Run `train(*arguments, progress)` in a process of its own and kill it in epoch 2."""
    with forked(_train, train, *arguments) as (process, pipe):
        assert heard(pipe) == "middle"
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(HANG)
        assert process.exitcode == -signal.SIGKILL


def _train(pipe: Connection, train: Callable[..., object], *arguments: Any) -> None:
    def progress(epoch: int, step: int, steps: int) -> None:
        if epoch == 2 and step == 1:
            pipe.send("middle")
            time.sleep(HANG)

    train(*arguments, progress)
