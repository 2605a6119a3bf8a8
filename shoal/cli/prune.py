"""The command that prunes a network. `app` gives it its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal import units
from shoal.cli.exits import LEFT
from shoal.cli.options import DataDir, Json, grid, numbers, show, trains
from shoal.jobs import prune as job
from shoal.jobs.inputs import Shared


@trains
def prune(
    run: Annotated[Path, typer.Argument(help="A run folder; its network may have one exit or several.")],
    amount: Annotated[str, typer.Option(help="Parts to prune, with commas between; a run for each.")] = "0.5,0.7,0.9",
    method: Annotated[
        str,
        typer.Option(
            help="weights (the smallest of all layers), filters (the smallest of each convolution) or channels (the "
            "least of each group of layers, cut out by Torch-Pruning; needs shoal[prune])."
        ),
    ] = "weights",
    epochs: Annotated[int, typer.Option(help="Epochs of training after pruning.")] = 10,
    rate: Annotated[float, typer.Option(help="Learning rate at first; it falls to 0 along a cosine.")] = 0.01,
    data_dir: DataDir = None,
    *,
    shared: Shared,
    json: Json = False,
) -> None:
    """Prune a trained network by magnitude and train it on, by several amounts: accuracy against weights left.

    Run it on a network with self-distillation and on one without to compare them (the paper's Fig. 6). Pruned weights
    and filters are zeros in layers of the same size; MACs stay what they are. Channels are cut out, and MACs, ReLUs
    and parameters with them; such a network is compiled, served and, without exits, reduced as any other.
    OUT/amount-0.5 and so on are runs of their own, and OUT/pruning.json and pruning.png hold the figures.
    """
    body = job.prune_by_amounts(run, numbers(amount, "--amount"), method, epochs, rate, data_dir, shared)
    rows = [
        [f"{row['amount']:g}", *(units.count(row[k]) for k in LEFT), "  ".join(map(units.percent, row["accuracy"]))]
        for row in body["rows"]
    ]
    heads = ["fraction pruned", "weights left", "MACs", "ReLUs", "test accuracy of each exit, %"]
    show(body, json, lambda: grid(f"{run}: {method} pruned", heads, rows, texts=()))
