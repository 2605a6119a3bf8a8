"""The command that reduces a network. `app` gives it its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.options import DataDir, Json, Preset, numbers, show, trains
from shoal.jobs import deepreduce as grid
from shoal.jobs import reduce as job
from shoal.jobs.inputs import Shared
from shoal.reduction.learners import SUMMARIES
from shoal.report import comparison_table

MASKS = "How positions are chosen: " + "; ".join(f"{name}: {what}" for name, what in SUMMARIES.items()) + "."


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
        grid.check_unused(choices | unused)
        body = grid.reduce_by_grid(teacher, preset, budget, designs, data_dir, epochs, shared)
        return show(body, json, lambda: grid.front_table(body))
    job.check_sources(budget, plan, designs)
    body = job.reduce(teacher, recipe, preset, choices, sensitivity, data_dir, epochs, shared, plan, masks_from)
    show(body, json, lambda: comparison_table(body))
