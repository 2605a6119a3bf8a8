"""Small fits that tests of training share."""

from __future__ import annotations

import signal
import subprocess
import sys
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


KILLED = """
import time, torch
torch.set_num_threads(1)
from pathlib import Path
from {module} import *
def slow(epoch, step, steps):
    if epoch == 2 and step == 1:
        print("middle", flush=True)
        time.sleep(60)
{fit}
"""


def kill_in_the_middle(module: str, fit: str) -> None:
    """Run `fit`, a statement with `slow` for its progress, after `from module import *`, and kill it in epoch 2."""
    code = KILLED.format(module=module, fit=fit)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "middle\n"
        child.send_signal(signal.SIGKILL)
