"""The command line. Thin: each command calls one part of the library and prints a table or JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoal import commands, private_cli, training
from shoal.errors import ShoalError
from shoal.options import DataDir, Json, grid, pairs, show
from shoal.report import comparison_table

HELP = """Make a trained CNN shallow and ReLU-light, then run it privately between two parties.

A first tour (each command explains itself with --help):

  shoal demo --out runs/demo                      everything below, on embedded data

  shoal count resnet18 --input 3x32x32 --classes 100

  shoal train resnet18 --data cifar100 --data-dir DATA --out runs/teacher

  shoal reduce runs/teacher --budget 49600 --preset paper --out runs/reduced

  shoal compile runs/reduced --out artifact; shoal certs certs

  shoal serve artifact/server --cert certs/server.pem --key certs/server.key --ca certs/ca.pem

  shoal prepare artifact/client --count 10 --cert certs/client.pem --key certs/client.key --ca certs/ca.pem

  shoal query artifact/client IMAGE.png --cert certs/client.pem --key certs/client.key --ca certs/ca.pem
"""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

Out = Annotated[Path, typer.Option(help="The folder to write; it must be new or empty, unless --resume.")]
Seed = Annotated[int, typer.Option(help="Decides initial weights, batches and the validation split.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16 (autocast).")]
MaxSeconds = Annotated[
    float | None, typer.Option(help="Stop at a checkpoint before this many seconds, all stages together.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of --out.")]
Preset = Annotated[str, typer.Option(help="Schedules and losses: quick, paper or reference-code.")]
Epochs = Annotated[int | None, typer.Option(help="Instead of the preset's number.")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events (extra).")]


@app.command()
def count(
    model: Annotated[str, typer.Argument(help="A zoo name, or package.module:callable that returns an nn.Module.")],
    input: Annotated[str, typer.Option(help="Image size, channels x height x width.")] = "3x32x32",
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    width: Annotated[float, typer.Option(help="Channel multiplier of a zoo network.")] = 1.0,
    resolution: Annotated[float, typer.Option(help="1, 0.5 or 0.25: feature-map multiplier of a zoo network.")] = 1.0,
    json: Json = False,
) -> None:
    """Count ReLUs, MACs, conv depth and parameters, and list every ReLU site.

    MACs are those of convolutions, 1x1 shortcuts included; depth is convolutions on the longest path.
    """
    body = commands.count(model, input, classes, width, resolution)
    head = [
        f"{body['relus']:,} ReLUs",
        f"{body['macs']:,} MACs",
        f"depth {body['depth']}",
        f"{body['params']:,} parameters",
    ]
    rows = [
        [s["name"], "x".join(map(str, s["shape"])), f"{s['relus']:,}", str(s["stage"]), str(s["block"])]
        for s in body["sites"]
    ]
    show(
        body, json, lambda: grid(f"{model}: {', '.join(head)}", ["ReLU site", "shape", "ReLUs", "stage", "block"], rows)
    )
    for name in body["unknown"]:
        Console(stderr=True).print(f"found {name} without a formula; its cost is missing from the totals")


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="A zoo name, or package.module:callable.")],
    data: Annotated[
        str, typer.Option(help="digits, fashion-mnist, cifar10, cifar100, svhn, tiny-imagenet or a folder.")
    ],
    out: Out,
    data_dir: DataDir = None,
    width: Annotated[float, typer.Option(help="Channel multiplier.")] = 1.0,
    resolution: Annotated[float, typer.Option(help="Feature-map multiplier: 1, 0.5 or 0.25.")] = 1.0,
    preset: Preset = "quick",
    epochs: Epochs = None,
    limit: Annotated[int | None, typer.Option(help="Use only this many training images.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    precision: Precision = "fp32",
    max_seconds: MaxSeconds = None,
    resume: Resume = False,
    tensorboard: TensorBoard = False,
    json: Json = False,
) -> None:
    """Train an all-ReLU network: the teacher of a reduction, or a baseline.

    Several GPUs or processes: torchrun --nproc-per-node=N -m shoal train ...
    """
    shared = training.Shared(out, seed, device, precision, max_seconds, resume, tensorboard)
    body = training.train(model, data, data_dir, width, resolution, preset, epochs, limit, shared)
    show(body, json, lambda: pairs(f"{model} on {data}", body))


@app.command()
def reduce(
    teacher: Annotated[Path, typer.Argument(help="A run folder of `shoal train`.")],
    budget: Annotated[int, typer.Option(help="ReLUs to keep in the whole network.")],
    out: Out,
    recipe: Annotated[str, typer.Option(help="shallow: Making Models Shallow Again.")] = "shallow",
    preset: Preset = "quick",
    d_th: Annotated[float, typer.Option("--d-th", help="Gate blocks whose assigned ratio is below this.")] = 0.05,
    gates: Annotated[
        bool, typer.Option("--gates/--no-gates", help="Replace low-budget blocks by one convolution.")
    ] = True,
    gate: Annotated[
        list[str] | None, typer.Option(help="A block to gate, by its inner ReLU site (repeat it), instead of --d-th.")
    ] = None,
    exit: Annotated[bool, typer.Option("--exit/--no-exit", help="Train an auxiliary classifier (AKD).")] = True,
    keep: Annotated[str, typer.Option(help="The classifier to deploy: final or auxiliary.")] = "final",
    masks: Annotated[str, typer.Option(help="senet, or random as an ablation at equal budget.")] = "senet",
    granularity: Annotated[str, typer.Option(help="pixel or channel.")] = "pixel",
    ramp: Annotated[str, typer.Option(help="How gates open: linear or cosine.")] = "linear",
    sensitivity: Annotated[Path | None, typer.Option(help="JSON {site: value} instead of stage 1.")] = None,
    data_dir: DataDir = None,
    epochs: Annotated[str | None, typer.Option(help="sensitivity,mask,finetune instead of the preset's.")] = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    max_seconds: MaxSeconds = None,
    resume: Resume = False,
    tensorboard: TensorBoard = False,
    json: Json = False,
) -> None:
    """Reduce a trained network to a ReLU budget by sensitivity, learned masks, gated branches and an exit.

    Prints the baseline beside the reduced network, and the MACs by both accountings of replaced blocks.
    """
    shared = training.Shared(out, 0, device, precision, max_seconds, resume, tensorboard)
    choices = {"d_th": d_th, "gates": gates, "exit": exit, "keep": keep, "masks": masks, "granularity": granularity}
    choices |= {"ramp": ramp, "budget": budget, "gated": tuple(gate) if gate else None}
    body = training.reduce(teacher, recipe, preset, choices, sensitivity, data_dir, epochs, shared)
    show(body, json, lambda: comparison_table(body))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder of train, reduce or demo.")],
    data_dir: DataDir = None,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Also in fixed point, in the clear, on the whole test set.")
    ] = False,
    json: Json = False,
) -> None:
    """Test accuracy and counts of a run's network; --fixed adds the private arithmetic, bit for bit."""
    body = commands.evaluate(run, data_dir, fixed)
    show(body, json, lambda: pairs(str(run), body))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders with a summary.json.")],
    csv: Annotated[Path | None, typer.Option(help="Also write the rows as CSV.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page with all charts.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw accuracy against ReLUs with the front.")] = None,
    network: Annotated[
        str | None, typer.Option(help="Forecast online seconds over none, lan or wan (the page: none unless given).")
    ] = None,
    machine: Annotated[Path | None, typer.Option(help="Constants for forecasts, from `shoal calibrate`.")] = None,
    json: Json = False,
) -> None:
    """One table over runs, and each run's training curves as curves.png in its folder.

    The page (--html) holds Pareto fronts, the papers' points beside ours, per-site budgets, curves, and every figure as
    a table; it loads nothing from outside. Runs that differ by seed only are one point, with their spread.
    """
    body = commands.report(runs, commands.Asked(csv, html, png, network, machine))
    show(body, json, lambda: commands.report_table(body))


for name, command in (
    ("compile", private_cli.compile_),
    ("certs", private_cli.certs),
    ("serve", private_cli.serve),
    ("prepare", private_cli.prepare),
    ("query", private_cli.query),
    ("bench", private_cli.bench),
    ("calibrate", private_cli.calibrate),
    ("cost", private_cli.cost),
):
    app.command(name)(command)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder to write.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    images: Annotated[int, typer.Option(help="Test images queried between the two processes.")] = 32,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train, reduce, fold and privately run a network on scikit-learn's digits; under 6 minutes on two cores."""
    body = training.demo(out, overwrite, images, seed)
    show(body, json, lambda: comparison_table(body))


def main() -> None:
    """Run the command line; a ShoalError is one clear sentence on standard error and exit status 1."""
    try:
        app(standalone_mode=True)
    except ShoalError as error:
        Console(stderr=True, soft_wrap=True).print(f"shoal: {error}", markup=False, highlight=False)
        sys.exit(1)
