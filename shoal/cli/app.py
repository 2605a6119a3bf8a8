"""The command line. Thin: each command calls one part of the library and prints a table or JSON."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console

from shoal import check as checking
from shoal import (
    commands,
    cost_cli,
    dynamic_cli,
    grid_reduction,
    inplace_cli,
    osakd_cli,
    private_cli,
    self_distill_cli,
    sweep_cli,
    training,
)
from shoal.errors import ShoalError, ShoalWarning
from shoal.learners import SUMMARIES
from shoal.options import (
    DataDir,
    Epochs,
    Json,
    Replace,
    Seed,
    numbers,
    pairs,
    show,
    trains,
)
from shoal.report import comparison_table
from shoal.training import Shared

HELP = """Make a trained CNN shallow and ReLU-light, then run it privately between two parties.

A first tour (each command explains itself with --help):

  shoal demo --out runs/demo                      everything below, on embedded data

  shoal count resnet18 --input 3x32x32 --classes 100

  shoal check mypackage.nets:MyCNN --input 3x32x32    what cannot run in private, and what to do instead

  shoal train resnet18 --data cifar100 --data-dir DATA --out runs/teacher

  shoal reduce runs/teacher --budget 49600 --preset paper --out runs/reduced

  shoal self-distill resnet18 --data cifar100 --data-dir DATA --out runs/exits    several classifiers in one network
  shoal inplace msdnet-7 --data cifar100 --data-dir DATA --out runs/msdnet     all of its exits at once, or --widths
  shoal distill osakd resnet18 --data cifar100 --data-dir DATA --out runs/osakd     or by a teacher, or by peers

  shoal exits runs/exits                                      let images leave early that an exit is sure of

  shoal plan runs/teacher --target 0.5s --network lan --out plan.json     or a target in seconds, before training

  shoal sweep GRID.yaml --out runs/sweep          many of both: grids and seeds, some at once

  shoal compile runs/reduced --out artifact; shoal certs certs

  shoal serve artifact/server --cert certs/server.pem --key certs/server.key --ca certs/ca.pem

  shoal prepare artifact/client --count 10 --cert certs/client.pem --key certs/client.key --ca certs/ca.pem

  shoal query artifact/client IMAGE.png --cert certs/client.pem --key certs/client.key --ca certs/ca.pem
"""

MASKS = "How positions are chosen: " + "; ".join(f"{name}: {what}" for name, what in SUMMARIES.items()) + "."

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None)

Preset = Annotated[
    str,
    typer.Option(
        help="Schedules and losses: quick, paper or reference-code; to train a teacher for deepreduce, "
        "deepreduce-paper or deepreduce-paper-cifar10; with --recipe deepreduce quick, paper or paper-cifar10."
    ),
]


@app.command()
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
    body = commands.count(model, input, classes, width, resolution, design, replace or ())
    show(body, json, lambda: commands.count_table(model, body))
    for name in body["unknown"]:
        Console(stderr=True).print(f"found {name} without a formula; its cost is missing from the totals")


@app.command()
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
    body = checking.check(model, input, classes, width, resolution, replace or ())
    show(body, json, lambda: checking.summary(model, body))


@app.command()
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
    body = training.train(model, data, data_dir, width, resolution, preset, epochs, limit, shared, replace or ())
    show(body, json, lambda: pairs(f"{model} on {data}", body))


@app.command()
@trains
def reduce(
    teacher: Annotated[Path, typer.Argument(help="A run folder of `shoal train`.")],
    budget: Annotated[
        int | None, typer.Option(help="ReLUs to keep in the whole network; deepreduce: to choose a design by, at most.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="What shoal plan wrote: budget, gates and classifier.")] = None,
    recipe: Annotated[
        str, typer.Option(help="shallow: Making Models Shallow Again; deepreduce: DeepReDuce's grid of designs.")
    ] = "shallow",
    designs: Annotated[
        str | None,
        typer.Option(help="deepreduce: only these, by place in the grid or name, such as 1-5,8,S2RT+S3-a0.5-r0.5."),
    ] = None,
    preset: Preset = "quick",
    d_th: Annotated[float, typer.Option("--d-th", help="Gate blocks whose assigned ratio is below this.")] = 0.05,
    gates: Annotated[
        bool, typer.Option("--gates/--no-gates", help="Replace low-budget blocks by one convolution.")
    ] = True,
    gate: Annotated[
        list[str] | None, typer.Option(help="A block to gate, by its inner ReLU site (repeat it), instead of --d-th.")
    ] = None,
    gate_limit: Annotated[
        float | None,
        typer.Option(help="Gate what brings --gate-price to this part at the least loss of accuracy."),
    ] = None,
    gate_price: Annotated[str, typer.Option(help="macs, or forecast seconds: online, offline or direct.")] = "macs",
    exit: Annotated[bool, typer.Option("--exit/--no-exit", help="Train an auxiliary classifier (AKD).")] = True,
    keep: Annotated[str, typer.Option(help="The classifier to deploy: final or auxiliary.")] = "final",
    masks: Annotated[str, typer.Option(help=MASKS)] = "senet",
    granularity: Annotated[str, typer.Option(help="pixel or channel.")] = "pixel",
    widths: Annotated[
        str | None,
        typer.Option(
            help="SENet++: parts of the channels, such as 0.5,1, trained as one network; a run each in OUT/widths."
        ),
    ] = None,
    ramp: Annotated[str, typer.Option(help="How gates open: linear or cosine.")] = "linear",
    sensitivity: Annotated[Path | None, typer.Option(help="JSON {site: value} instead of stage 1.")] = None,
    masks_from: Annotated[
        Path | None,
        typer.Option(help="Another run of reduce whose masks to take: same teacher and budget, other fine-tuning."),
    ] = None,
    data_dir: DataDir = None,
    epochs: Annotated[
        str | None,
        typer.Option(help="Instead of the preset's: sensitivity,mask,finetune; deepreduce: criticality,design."),
    ] = None,
    *,
    shared: Shared,
    json: Json = False,
) -> None:
    """Reduce a trained network to a ReLU budget: learned masks and gated branches, or a grid of thinner designs.

    --recipe shallow (the default): sensitivity, learned masks, gated branches and an exit. Instead of --budget, --plan
    takes what shoal plan chose for seconds, bytes or ReLUs. Prints the baseline beside the reduced network, and the
    MACs by both accountings of replaced blocks.

    --recipe deepreduce: measures how critical each stage's ReLUs are, then trains 5 (D - 1) designs by distillation:
    whole stages culled, every other ReLU layer left out, half the channels, half the resolution. Each design is a run
    in OUT/designs, and OUT/front.json and front.png hold the Pareto front of ReLUs against validation accuracy. OUT
    itself is the design with most validation accuracy at or below --budget. --resume goes on after a kill, and
    trains further --designs or chooses by another --budget.
    """
    choices = {"d_th": d_th, "gates": gates, "exit": exit, "keep": keep, "masks": masks, "granularity": granularity}
    choices |= {"ramp": ramp, "budget": budget, "gated": tuple(gate) if gate else None, "gate_limit": gate_limit}
    choices["gate_price"] = gate_price
    choices["widths"] = numbers(widths, "--widths")
    if recipe == "deepreduce":
        unused = {"sensitivity": sensitivity, "plan": plan, "masks_from": masks_from}
        grid_reduction.check_unused(choices | unused)
        body = grid_reduction.reduce_by_grid(teacher, preset, budget, designs, data_dir, epochs, shared)
        return show(body, json, lambda: grid_reduction.front_table(body))
    training.check_sources(budget, plan, designs)
    body = training.reduce(teacher, recipe, preset, choices, sensitivity, data_dir, epochs, shared, plan, masks_from)
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
    ("inplace", inplace_cli.inplace),
    ("anytime", inplace_cli.anytime),
    ("distill", osakd_cli.distill),
    ("sweep", sweep_cli.sweep),
    ("self-distill", self_distill_cli.self_distill),
    ("exits", dynamic_cli.exits),
    ("export", dynamic_cli.export),
    ("analyse", dynamic_cli.analyse),
    ("prune", dynamic_cli.prune),
    ("compile", private_cli.compile_),
    ("certs", private_cli.certs),
    ("serve", private_cli.serve),
    ("prepare", private_cli.prepare),
    ("query", private_cli.query),
    ("bench", cost_cli.bench),
    ("calibrate", cost_cli.calibrate),
    ("cost", cost_cli.cost),
    ("plan", cost_cli.plan),
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
    """Run the command line; a ShoalError is one clear sentence on standard error and status 1, or 75 for a stop.

    So is a ShoalWarning, which ends nothing.
    """
    warnings.showwarning = _shown
    try:
        app(standalone_mode=True)
    except ShoalError as error:
        _say(str(error))
        sys.exit(error.status)


def _shown(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = f"{filename}:{lineno}: {category.__name__}: {message}"
    _say(str(message) if issubclass(category, ShoalWarning) else text)


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"shoal: {text}", markup=False, highlight=False)
