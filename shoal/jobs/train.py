"""What the commands that train do: check everything, make a run folder, fill it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shoal.errors import ShoalError
from shoal.jobs.inputs import Shared, check_network, load_data, longer
from shoal.networks.figures import figures
from shoal.networks.spec import Spec
from shoal.networks.stored import save_network
from shoal.progress import bars
from shoal.recipes import deepreduce, shallow
from shoal.recipes.stages import train_teacher
from shoal.report import plot_curves
from shoal.storage.origins import began
from shoal.storage.run import Run
from shoal.training.loop import join
from shoal.training.schedule import Schedule


def train(
    model: str,
    data: str,
    data_dir: Path | None,
    width: float,
    resolution: float,
    preset: str,
    epochs: int | None,
    limit: int | None,
    shared: Shared,
    replaced: Sequence[str] = (),
) -> dict[str, Any]:
    """Train an all-ReLU network into a run folder."""
    config: dict[str, Any] = {
        "command": "train",
        "data": data,
        "data_dir": data_dir,
        "seed": shared.seed,
        "limit": limit,
    }
    config |= {"preset": preset, "epochs": epochs, "model": model, "width": width, "resolution": resolution}
    config |= {"replaced": list(replaced)} if replaced else {}
    shared.check()
    schedule = longer(_teacher_schedule(preset), epochs)
    dataset = load_data(config, data_dir, shared.device)
    spec = Spec(model, dataset.classes, dataset.shape, width, resolution, replaced=tuple(replaced))
    check_network(spec)  # before anything is written
    rank, size = join()
    run = shared.run(began(config, dataset, data_dir)) if rank == 0 else Run(shared.out)
    if size > 1:
        torch.distributed.barrier()
    with bars({"teacher": schedule.epochs}) as shown:
        network, history = train_teacher(
            spec, dataset, schedule, shared.settings(), run=run, listen=shown.listen, tensorboard=shared.tensorboard
        )
    if rank == 0:
        save_network(run, spec, network)
        plot_curves(run, run.folder / "curves.png")
    return figures(network, dataset, spec, shared.settings()) | {
        "best_epoch": history.best_epoch,
        "validation": history.best,
        "out": str(shared.out),
    }


def _teacher_schedule(preset: str) -> Schedule:
    """How a recipe's preset trains the teacher; those of deepreduce go by ``deepreduce-`` and their name."""
    own = {f"deepreduce-{name}": make for name, make in deepreduce.PRESETS.items() if name != "quick"}
    if preset in own:
        return own[preset]().teacher
    if preset not in shallow.PRESETS:
        raise ShoalError(f"found preset {preset!r}; need one of {', '.join([*shallow.PRESETS, *own])}")
    return shallow.PRESETS[preset]().teacher
