"""`shoal self-distill`."""

from __future__ import annotations

from shoal import units
from shoal.cli.options import Json, grid, show, trains
from shoal.jobs import self_distill as job
from shoal.jobs.options import Shared
from shoal.recipes.self_distill import Options
from shoal.report.layout import Grid
from shoal.report.tables import remarks_on_tests
from shoal.storage.summary import Summary


@trains
def self_distill(request: job.Request, options: Options, *, shared: Shared, json: Json = False) -> None:
    """Train a network with several exits (classifiers); deeper ones teach the shallow ones (Self-Distillation).

    Shows each classifier and both ensembles, and as the baseline the plain network after as many epochs. "MACs with all
    weaker ones" are those of an image that passes all exits up to this one. OUT holds the network with all classifiers;
    OUT/exits/1, 2, ... are runs of one classifier alone, from weak to strong, for shoal evaluate and compile.

    Example: shoal self-distill resnet18 --data cifar100 --out runs/exits
    """
    summary = job.distill(request, options, shared)
    body = summary.as_json() | ({} if summary.baseline is None else {"lost": summary.lost})
    show(body, json, lambda: classifier_table(summary))


def classifier_table(summary: Summary) -> Grid:
    """A table with a row for each classifier, both ensembles and the baseline."""
    names = [*(summary.after or ()), "final"]
    rows = [
        [
            name,
            units.percent(row["accuracy"]),
            *map(units.count, (row["params"], row["relus"])),
            *map(units.millions, (row["macs"], row["cascaded_macs"])),
        ]
        for name, row in zip(names, summary.exits or (), strict=True)
    ]
    rows += [[f"mean of {k}", units.percent(v), "", "", "", ""] for k, v in (summary.ensemble or {}).items()]
    if summary.baseline is not None:
        rows.append(["plain network", units.percent(summary.baseline["accuracy"]), "", "", "", ""])
    head = ["classifier after", "test accuracy, %", "parameters", "ReLUs", "MACs, millions"]
    head += ["MACs with all weaker ones, millions"]
    made = grid(f"{summary.model} on {summary.data}, seed {summary.seed}", head, rows)
    tests = remarks_on_tests({"plain network": summary.baseline, "final classifier": summary.reduced})
    made.caption = "\n".join(filter(None, (summary.verdict("self-distillation"), *tests)))
    return made
