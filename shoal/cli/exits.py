"""The commands of networks with several exits. `cli` gives them their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoal import units
from shoal.cli.options import DataDir, Json, grid, pairs, show
from shoal.jobs import exits as job
from shoal.report.layout import Grid

RunFolder = Annotated[Path, typer.Argument(help="A run folder whose network has several exits.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def exits(
    run: RunFolder,
    budget: Annotated[
        str | None,
        typer.Option(help="Most accuracy at this part of the full network's MACs (0.5), or seconds an image (2ms)."),
    ] = None,
    loss: Annotated[
        float | None,
        typer.Option(help="Least MACs at this loss of validation accuracy, in points. The default goal: 0."),
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="The paper's fitness: acceleration + beta x points of accuracy gained.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="grid (all combinations), genetic (the paper's) or evolution (differential); the grid up to four "
            "thresholds, evolution beyond, if left out."
        ),
    ] = None,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Where no exit is sure, the mean of all exits' logits answers.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(help="Size of the batches that a budget in seconds counts for; 64 if left out.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Stages by torch.compile, each by itself.")] = False,
    rounds: Annotated[int, typer.Option(help="Timed rounds whose median is shown.")] = 5,
    data_dir: DataDir = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Let every image leave at the first exit that is sure of it: search thresholds, and measure what they save.

    Thresholds are searched on validation images; accuracy, mean MACs, shares and seconds are of test images, seconds
    in batches of 64 and of 1, beside the full network's. RUN/thresholds.json keeps them for shoal export, and
    RUN/exits.png shows accuracy against MACs with every exit alone beside.
    """
    wanted = job.Wanted(budget, loss, beta, batch)
    body = job.exits(
        run,
        wanted,
        method=method,
        ensemble=ensemble,
        compiled=compiled,
        rounds=rounds,
        data_dir=data_dir,
        device=device,
    )
    show(body, json, lambda: exits_table(str(run), body))


def exits_table(title: str, body: dict[str, Any]) -> Grid:
    """Every exit, the full network and dynamic inference, with thresholds and shares."""
    thresholds = [f"{t:.4f}" for t in body["thresholds"]]
    rows = []
    for i, (row, share) in enumerate(zip(body["exits"], body["test"]["shares"], strict=True)):
        threshold = thresholds[i] if i < len(thresholds) else "none"
        rows.append([f"exit {i + 1} alone", *_worth(row), threshold, units.share(share).removesuffix(" %")])
    rows.append(["all exits, by thresholds", *_worth(body["test"]), "", ""])
    head = ["", "test accuracy, %", "MACs an image, millions", "threshold", "images that leave here, %"]
    table = grid(title, head, rows)
    times = [_timing(batch, row) for batch, row in body["seconds"].items()]
    kinds = dict.fromkeys(name.partition(" (")[2].partition(" of ")[0].rstrip(")") for name in body["uncounted"])
    missing = [f"not counted in MACs: {', '.join(kinds)}"] if kinds else []
    table.caption = "\n".join([*times, *missing])
    return table


def _worth(row: dict[str, Any]) -> list[str]:
    return [units.percent(row["accuracy"]), units.millions(row["macs"])]


def _timing(batch: str, row: dict[str, float]) -> str:
    dynamic, full = units.milliseconds(row["dynamic"]), units.milliseconds(row["full"])
    faster = f"{units.ratio(row['full'], row['dynamic'])} time"
    return f"batches of {batch}: {dynamic} ms an image; the full network {full} ms ({faster})"


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.")],
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Write a run with several exits as ONNX, a file for each stage, with thresholds and order in cascade.json.

    Stages take any number of images, so those that are sure can leave between two of them. Wants RUN/thresholds.json
    (shoal exits) and the extra shoal[export]; the stages' logits are compared with the network's before it ends.
    """
    body = job.export(run, out, data_dir)
    show(body, json, lambda: pairs(str(run), body))


LEFT = ("weights", "macs", "relus")
"""What the table of shoal prune shows of each row, besides accuracy."""
