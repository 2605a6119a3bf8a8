"""`shoal self-distill`: several classifiers in one network, the shallow ones taught by the deeper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoal import units
from shoal.cli.options import DataDir, Epochs, Json, Replace, Seed, grid, show, trains
from shoal.data.augment import CLOUD_POLICIES, POLICIES
from shoal.distillation.paths import PATHS
from shoal.exits.points import CHOSEN, FIXED
from shoal.jobs import self_distill as job
from shoal.jobs.inputs import Shared
from shoal.recipes.beside import BESIDE
from shoal.recipes.self_distill import AUTO, PRESETS, Options
from shoal.report.layout import Grid


@trains
def self_distill(
    model: Annotated[str, typer.Argument(help="A zoo name, package.module:callable, or a run folder of shoal train.")],
    data: Annotated[str | None, typer.Option(help="As for shoal train; a run folder has its own.")] = None,
    data_dir: DataDir = None,
    width: Annotated[float, typer.Option(help="Channel multiplier.")] = 1.0,
    resolution: Annotated[float, typer.Option(help="Feature-map multiplier: 1, 0.5 or 0.25.")] = 1.0,
    scheme: Annotated[
        str,
        typer.Option(
            help=f"Where classifiers go: {', '.join((*FIXED, *CHOSEN))}; auto is downsample, for point clouds two "
            "uniform ones."
        ),
    ] = AUTO,
    count: Annotated[
        int | None, typer.Option(help=f"How many shallow classifiers ({', '.join(CHOSEN)}); 3 unless given.")
    ] = None,
    after: Annotated[
        list[str] | None, typer.Option(help="A submodule after which one goes (repeat it), instead of --scheme.")
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            help="attention (trains best, not for private inference), aligned (also in private), plain (one layer), or "
            "pooled; auto is attention, for point clouds pooled."
        ),
    ] = AUTO,
    path: Annotated[str | None, typer.Option(help=f"Who teaches: {', '.join(PATHS)}; or as the preset.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the divergence, 0 to 1; or as the preset.")] = None,
    feature_weight: Annotated[
        float | None, typer.Option(help="Weight of the distance of features (lambda); or as the preset.")
    ] = None,
    augment: Annotated[
        str | None, typer.Option(help=f"{', '.join((*POLICIES, *CLOUD_POLICIES[1:]))}; or as the preset.")
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(help="Learn also from " + "; ".join(f"{name}: {what}" for name, what in BESIDE.items()) + "."),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="kd, at: a run of shoal train on the same data, with the same seed.")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Also train the plain network by the same schedule.")
    ] = True,
    preset: Annotated[str, typer.Option(help=f"Schedule and loss: {', '.join(PRESETS)}.")] = "quick",
    epochs: Epochs = None,
    limit: Annotated[int | None, typer.Option(help="Use only this many training images.")] = None,
    replace: Replace = None,
    seed: Seed = 0,
    *,
    shared: Shared,
    json: Json = False,
) -> None:
    """Train one network with several classifiers, the shallow ones taught by the deeper (Self-Distillation).

    Prints every classifier and both ensembles beside the plain network trained as long; cascaded MACs are those of the
    weaker classifiers, too, asked before. OUT holds the network with all classifiers; OUT/exits/1, 2, ... each is a run
    of one of them alone, weak to strong, for shoal evaluate and compile.
    """
    source = job.Source(model, data, data_dir, width, resolution, limit, tuple(replace or ()))
    options = Options(scheme, count, tuple(after or ()), kind, path, alpha, feature_weight, augment, beside, baseline)
    body = job.distill(source, preset, epochs, options, shared, teacher)
    show(body, json, lambda: classifier_table(body))


def classifier_table(body: dict[str, Any]) -> Grid:
    """Classifiers down, with both ensembles and the baseline; accuracy and costs across."""
    names = [*body["after"], "final"]
    rows = [
        [name, units.percent(row["accuracy"]), units.count(row["params"]), units.count(row["relus"])]
        + [units.millions(row[k]) for k in ("macs", "cascaded_macs")]
        for name, row in zip(names, body["exits"], strict=True)
    ]
    rows += [[f"mean of {k}", units.percent(v), "", "", "", ""] for k, v in body["ensemble"].items()]
    if "baseline" in body:
        rows.append(["plain network", units.percent(body["baseline"]["accuracy"]), "", "", "", ""])
    head = ["classifier after", "test accuracy, %", "parameters", "ReLUs", "MACs, millions"]
    head += ["MACs with all weaker ones, millions"]
    return grid(f"{body['model']} on {body['data']}, seed {body['seed']}", head, rows)
