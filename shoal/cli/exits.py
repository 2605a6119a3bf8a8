"""The commands of networks with several exits. `cli` gives them their names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from shoal import analysing, early_exit, prune_grid
from shoal import export as exporting
from shoal.options import DataDir, Json, grid, numbers, pairs, show, trains
from shoal.training import Shared

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
    wanted = early_exit.Wanted(budget, loss, beta, batch)
    body = early_exit.exits(
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


def exits_table(title: str, body: dict[str, Any]) -> Table:
    """Every exit, the full network and dynamic inference, with thresholds and shares."""
    thresholds = [f"{t:.4f}" for t in body["thresholds"]]
    rows = []
    for i, (row, share) in enumerate(zip(body["exits"], body["test"]["shares"], strict=True)):
        threshold = thresholds[i] if i < len(thresholds) else "-"
        rows.append([f"exit {i + 1} alone", f"{row['accuracy']:.2f}", _millions(row), threshold, f"{share:.1%}"])
    rows.append(["dynamic", f"{body['test']['accuracy']:.2f}", _millions(body["test"]), "", ""])
    table = grid(title, ["", "test %", "M MACs", "threshold", "leave here"], rows)
    times = [
        f"batch {batch}: {1e3 * t['dynamic']:.3g} ms an image against {1e3 * t['full']:.3g}, {t['speedup']:.2f}x"
        for batch, t in body["seconds"].items()
    ]
    kinds = dict.fromkeys(name.partition(" (")[2].partition(" of ")[0].rstrip(")") for name in body["uncounted"])
    missing = [f"MACs leave out {', '.join(kinds)}"] if kinds else []
    table.caption = "\n".join([*times, *missing])
    return table


def _millions(row: dict[str, Any]) -> str:
    return f"{row['macs'] / 1e6:.3f}"


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
    body = exporting.export(run, out, data_dir)
    show(body, json, lambda: pairs(str(run), body))


def analyse(
    run: Annotated[Path, typer.Argument(help="A run folder; its network may have one exit or several.")],
    study: Annotated[
        list[str] | None,
        typer.Option(help=f"Only these (repeatable): {', '.join(analysing.STUDIES)}."),
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
    body = analysing.analyse(run, study or (), out, images, numbers(levels, "--levels"), seed, data_dir, device)
    rows = [[name, str(row["rows"]), ", ".join(row["files"]) or row["note"]] for name, row in body.items()]
    show(body, json, lambda: grid(str(run), ["study", "rows", "files"], rows))


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
    body = prune_grid.prune_by_amounts(run, numbers(amount, "--amount"), method, epochs, rate, data_dir, shared)
    rows = [
        [f"{row['amount']:g}", *(f"{row[k]:,}" for k in LEFT), " ".join(f"{a:.2f}" for a in row["accuracy"])]
        for row in body["rows"]
    ]
    heads = ["pruned", "weights left", "MACs", "ReLUs", "test %, by exit"]
    show(body, json, lambda: grid(f"{run}: {method} pruned", heads, rows))


LEFT = ("weights", "macs", "relus")
"""What the table of shoal prune shows of each row, besides accuracy."""
