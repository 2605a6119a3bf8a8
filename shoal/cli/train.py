"""The command that trains a network. `app` gives it its name."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.options import DataDir, Epochs, Json, Preset, Replace, Seed, pairs, show, trains
from shoal.jobs import train as job
from shoal.jobs.inputs import Shared


@trains
def train(
    model: Annotated[str, typer.Argument(help="A zoo name, or package.module:callable.")],
    data: Annotated[
        str,
        typer.Option(
            help="digits, fashion-mnist, cifar10, cifar100, svhn, tiny-imagenet, modelnet10, modelnet40 or a folder."
        ),
    ],
    data_dir: DataDir = None,
    width: Annotated[float, typer.Option(help="Channel multiplier.")] = 1.0,
    resolution: Annotated[float, typer.Option(help="Feature-map multiplier: 1, 0.5 or 0.25.")] = 1.0,
    preset: Preset = "quick",
    epochs: Epochs = None,
    limit: Annotated[int | None, typer.Option(help="Use only this many training images.")] = None,
    replace: Replace = None,
    seed: Seed = 0,
    *,
    shared: Shared,
    json: Json = False,
) -> None:
    """Train an all-ReLU network: the teacher of a reduction, or a baseline.

    Several GPUs or processes: torchrun --nproc-per-node=N -m shoal train ...
    """
    body = job.train(model, data, data_dir, width, resolution, preset, epochs, limit, shared, replace or ())
    show(body, json, lambda: pairs(f"{model} on {data}", body))
