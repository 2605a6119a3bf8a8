"""The command that analyses a network. `app` gives it its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal import units
from shoal.cli.exits import Device
from shoal.cli.options import DataDir, Json, grid, numbers, show
from shoal.jobs import analyse as job


def analyse(
    run: Annotated[Path, typer.Argument(help="A run folder; its network may have one exit or several.")],
    study: Annotated[
        list[str] | None,
        typer.Option(help=f"Only these (repeatable): {', '.join(job.STUDIES)}."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where files go; RUN/analysis if left out.")] = None,
    images: Annotated[
        int, typer.Option(help="Images to look at, evenly spread (thresholds: the whole test set).")
    ] = 1000,
    levels: Annotated[
        str, typer.Option(help="flat-minimum: standard deviations of the noise.")
    ] = "0,0.005,0.01,0.015,0.02,0.03,0.04",
    seed: Annotated[int, typer.Option(help="Decides the noise.")] = 0,
    data_dir: DataDir = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Look into a network as the self-distillation paper does, each study as a plot and a CSV file.

    flat-minimum: accuracy and loss under noise on the parameters; gradients: their size by layer and exit;
    separability and pca: features of each exit; attention: maps, where there are any; attribution: integrated
    gradients; thresholds: images and accuracy above a confidence. Exits are counted from 0 in the CSV files.
    """
    body = job.analyse(run, study or (), out, images, numbers(levels, "--levels"), seed, data_dir, device)
    rows = [[name, units.count(row["rows"]), ", ".join(row["files"]) or row["note"]] for name, row in body.items()]
    show(body, json, lambda: grid(str(run), ["study", "rows", "files, or why there are none"], rows, texts=(0, 2)))
