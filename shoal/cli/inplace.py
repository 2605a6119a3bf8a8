"""`shoal inplace` and `shoal anytime`: one training for several exits or widths, and what each is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoal import units
from shoal.cli.options import DataDir, Device, Epochs, Json, Replace, Seed, grid, numbers, show, trains
from shoal.jobs import inplace as job
from shoal.jobs.inputs import Shared
from shoal.recipes.inplace import METHODS, PRESETS, Options
from shoal.report.layout import Grid


@trains
def inplace(
    model: Annotated[str, typer.Argument(help="A zoo name, such as msdnet-7, or package.module:callable.")],
    data: Annotated[
        str, typer.Option(help="digits, fashion-mnist, cifar10, cifar100, svhn, tiny-imagenet or a folder.")
    ],
    method: Annotated[
        str, typer.Option(help=f"Who teaches: {', '.join(METHODS)} (nobody, the strongest, the next, all stronger).")
    ] = "ta-m",
    widths: Annotated[
        str | None, typer.Option(help="Make it slimmable to these parts of its channels: 0.25,0.5,0.75,1.")
    ] = None,
    exit: Annotated[
        list[str] | None, typer.Option(help="Give it a classifier after this ReLU site, as count lists (repeatable).")
    ] = None,
    shared_affine: Annotated[
        bool, typer.Option("--shared-affine", help="Widths share batch norms' scales and shifts, not statistics.")
    ] = False,
    sandwich: Annotated[
        int,
        typer.Option(help="Train the two ends and this many widths drawn between them a step, as US-Nets (2)."),
    ] = 0,
    direction: Annotated[
        str, typer.Option(help="KL: forward is teacher || student, reverse what the paper writes.")
    ] = "forward",
    data_dir: DataDir = None,
    width: Annotated[float, typer.Option(help="Channel multiplier.")] = 1.0,
    resolution: Annotated[float, typer.Option(help="Feature-map multiplier: 1, 0.5 or 0.25.")] = 1.0,
    preset: Annotated[str, typer.Option(help=f"Schedule and losses: {', '.join(PRESETS)}.")] = "quick",
    epochs: Epochs = None,
    limit: Annotated[int | None, typer.Option(help="Use only this many training images.")] = None,
    replace: Replace = None,
    seed: Seed = 0,
    *,
    shared: Shared,
    json: Json = False,
) -> None:
    """Train one network for all of its exits or widths at once; the stronger ones teach the weaker (IPKD-TA).

    Each classifier is a run of its own in OUT/exits/1, ... or OUT/widths/0.25, ..., to evaluate and compile. OUT itself
    is the network with all exits, or the widest one; anytime.json and anytime.png there have accuracy by multiply-adds.
    """
    asked = job.Asked(model, data, data_dir, width, resolution, preset, epochs, limit, replaced=tuple(replace or ()))
    options = Options(method, numbers(widths, "--widths"), tuple(exit or ()), shared_affine, sandwich, direction)
    body = job.train(asked, options, shared)
    show(body, json, lambda: anytime_table(body))


def anytime(
    run: Annotated[Path, typer.Argument(help="A run folder of shoal inplace, or of any network of several exits.")],
    budget: Annotated[
        list[float] | None, typer.Option(help="Multiply-adds an image on average (repeatable), such as 30e6.")
    ] = None,
    data_dir: DataDir = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Accuracy of every exit or width against its multiply-adds, and of early exits within a budget of them.

    Thresholds of confidence come from the validation split. Writes anytime.json and anytime.png into the run.
    """
    body = job.anytime(run, budget or (), data_dir, device)
    show(body, json, lambda: anytime_table(body))


def anytime_table(body: dict[str, Any]) -> Grid:
    """Each classifier's accuracy and multiply-adds, and below them what budgets give."""
    rows = [_cells(r["name"], r["accuracy"], r["macs"], units.millions(r["macs_in_order"])) for r in body["anytime"]]
    for row in body.get("budgets", ()):
        rows.append(_cells(f"budget of {units.millions(row['budget'])}", row["accuracy"], row["macs"], ""))
    head = ["classifier", "test accuracy, %", "MACs, millions", "MACs with all weaker ones, millions"]
    return grid(f"{body['model']} on {body['data']}", head, rows)


def _cells(name: str, accuracy: float, own: float, in_order: str) -> list[str]:
    return [name, units.percent(accuracy), units.millions(own), in_order]
