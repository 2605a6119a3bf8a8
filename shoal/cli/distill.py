"""`shoal distill`: OSAKD and the methods that it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoal import units
from shoal.cli.options import DataDir, Epochs, Json, Replace, grid, show, trains
from shoal.distillation.neighbours import LOSSES, SPACES
from shoal.jobs.distill import METHODS, Asked
from shoal.jobs.distill import distill as run_distill
from shoal.jobs.inputs import Shared
from shoal.report.layout import Grid

METHOD = "Who teaches the network: " + "; ".join(f"{name}: {what}" for name, what in METHODS.items()) + "."


@trains
def distill(
    method: Annotated[str, typer.Argument(help=METHOD)],
    model: Annotated[str, typer.Argument(help="The student: a zoo name, or package.module:callable.")],
    data: Annotated[
        str | None, typer.Option(help="A data set as in shoal train; with --teacher that of the teacher's run.")
    ] = None,
    data_dir: DataDir = None,
    teacher: Annotated[
        Path | None, typer.Option(help="A run folder of shoal train: kd, fitnet, at, spkd, rkd, overhaul, takd.")
    ] = None,
    assistant: Annotated[str | None, typer.Option(help="takd: the network between, of the student's width.")] = None,
    branches: Annotated[int, typer.Option(help="dml, one, ffl: networks or branches; 0 for the authors' number.")] = 0,
    k: Annotated[int | None, typer.Option(help="osakd: neighbours of a sample; 8 if left out.")] = None,
    space: Annotated[str | None, typer.Option(help=f"osakd: distances in {' or '.join(SPACES)}; logits.")] = None,
    loss: Annotated[str | None, typer.Option(help=f"osakd: {', '.join(LOSSES)}; mse-sum.")] = None,
    balance: Annotated[
        float | None, typer.Option(help="osakd: lambda, the part of the cross-entropy; the preset's if left out.")
    ] = None,
    bank: Annotated[
        int | None, typer.Option(help="osakd: outputs of earlier batches beside the mini-batch; 0.")
    ] = None,
    include_self: Annotated[
        bool, typer.Option("--include-self", help="osakd: a sample is one of its own neighbours.")
    ] = False,
    width: Annotated[float, typer.Option(help="Channel multiplier.")] = 1.0,
    resolution: Annotated[float, typer.Option(help="Feature-map multiplier: 1, 0.5 or 0.25.")] = 1.0,
    preset: Annotated[
        str, typer.Option(help="quick, paper; osakd also paper-resnet and paper-tiny-imagenet.")
    ] = "quick",
    epochs: Epochs = None,
    limit: Annotated[int | None, typer.Option(help="Use only this many training images.")] = None,
    replace: Replace = None,
    seed: Annotated[
        int | None, typer.Option(help="As in shoal train, 0 if left out; with --teacher that of its run.")
    ] = None,
    *,
    shared: Shared,
    json: Json = False,
) -> None:
    """Train a network by distillation: by its own neighbours, by a teacher, or together with others.

    The same network is trained by cross-entropy alone beside it, as long, from the same weights and on the same
    batches. OUT is the taught network, without what taught it: shoal evaluate, reduce and compile take it.
    """
    said: dict[str, Any] = {"k": k, "space": space, "loss": loss, "balance": balance, "bank": bank}
    said |= {"exclude_self": False if include_self else None}
    neighbours = {name: value for name, value in said.items() if value is not None}
    asked = Asked(
        method, model, data, data_dir, width, resolution, limit, seed, tuple(replace or ()), preset, epochs, teacher,
        assistant, branches, neighbours,
    )  # fmt: skip
    body = run_distill(asked, shared)
    show(body, json, lambda: table(body))


def table(summary: dict[str, Any]) -> Grid:
    """Baseline, taught network and teacher, and every classifier that was trained."""
    names = {"baseline": "baseline", "reduced": summary["method"], "teacher": "teacher"}
    rows = [
        [name, units.percent(row["accuracy"]), *(units.count(row[k]) for k in ("params", "macs", "relus"))]
        for side, name in names.items()
        if (row := summary.get(side)) is not None
    ]
    title = f"{summary['model']} on {summary['data']}, seed {summary['seed']}"
    made = grid(title, ["", "test accuracy, %", "parameters", "MACs", "ReLUs"], rows)
    if len(summary["classifiers"]) > 1:
        accuracies = ", ".join(map(units.percent, summary["classifiers"]))
        made.caption = f"test accuracy of all classifiers that were trained together, %: {accuracies}"
    return made
