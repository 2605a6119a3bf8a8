"""The commands that look at a network. `app` gives them their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoal.cli.options import DataDir, Json, Replace, pairs, show
from shoal.jobs import inspect as job


def count(
    model: Annotated[str, typer.Argument(help="A zoo name, or package.module:callable that returns an nn.Module.")],
    input: Annotated[
        str | None,
        typer.Option(help="Channels x height x width; 3x32x32 unless given, 3x1024x1 for clouds of points."),
    ] = None,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    width: Annotated[float, typer.Option(help="Channel multiplier of a zoo network.")] = 1.0,
    resolution: Annotated[float, typer.Option(help="1, 0.5 or 0.25: feature-map multiplier of a zoo network.")] = 1.0,
    design: Annotated[
        str | None, typer.Option(help="A DeepReDuce design of it, by the stages that keep ReLUs: S2RT+S3-a0.5-r0.5.")
    ] = None,
    replace: Replace = None,
    json: Json = False,
) -> None:
    """Count ReLUs, MACs, conv depth and parameters, and list every ReLU site.

    MACs are those of convolutions, 1x1 shortcuts included; depth is convolutions on the longest path. With --design
    also convolutions and MACs after folding, which is exact, and merged as the paper counts. S2RT is a stage with
    every other ReLU layer; -a0.5 half the channels, -r0.5 half the resolution, -one one block in each stage.
    """
    body = job.count(model, input, classes, width, resolution, design, replace or ())
    show(body, json, lambda: job.count_table(model, body))
    for name in body["unknown"]:
        Console(stderr=True).print(f"found {name} without a formula; its cost is missing from the totals")


def check(
    model: Annotated[str, typer.Argument(help="A zoo name, or package.module:callable that returns an nn.Module.")],
    input: Annotated[
        str | None,
        typer.Option(help="Channels x height x width; 3x32x32 unless given, 3x1024x1 for clouds of points."),
    ] = None,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    width: Annotated[float, typer.Option(help="Channel multiplier of a zoo network.")] = 1.0,
    resolution: Annotated[float, typer.Option(help="1, 0.5 or 0.25: feature-map multiplier of a zoo network.")] = 1.0,
    replace: Replace = None,
    json: Json = False,
) -> None:
    """Say of any network what it costs, which blocks could be shallower, and what cannot run in private.

    For each layer that cannot: its name, and what to use instead. Nothing is trained or compiled.
    """
    body = job.check(model, input, classes, width, resolution, replace or ())
    show(body, json, lambda: job.summary(model, body))


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder of train, reduce or demo.")],
    data_dir: DataDir = None,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Also in fixed point, in the clear, on the whole test set.")
    ] = False,
    json: Json = False,
) -> None:
    """Test accuracy and counts of a run's network; --fixed adds the private arithmetic, bit for bit."""
    body = job.evaluate(run, data_dir, fixed)
    show(body, json, lambda: pairs(str(run), body))
