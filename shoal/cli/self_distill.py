"""`shoal self-distill`: several classifiers in one network, the shallow ones taught by the deeper."""

from __future__ import annotations

from shoal import units
from shoal.cli.options import Json, grid, show, trains
from shoal.jobs import self_distill as job
from shoal.jobs.inputs import Shared
from shoal.recipes.self_distill import Options
from shoal.report.layout import Grid
from shoal.storage.summary import Summary


@trains
def self_distill(request: job.Request, options: Options, *, shared: Shared, json: Json = False) -> None:
    """Train one network with several classifiers, the shallow ones taught by the deeper (Self-Distillation).

    Prints every classifier and both ensembles beside the plain network, which is trained as long. Cascaded MACs include
    the weaker classifiers, which are asked first. OUT holds the network with all classifiers; OUT/exits/1, 2, ... are
    runs of one of them alone, weak to strong, for shoal evaluate and compile.
    """
    summary = job.distill(request, options, shared)
    body = summary.as_json() | ({} if summary.baseline is None else {"lost": summary.lost})
    show(body, json, lambda: classifier_table(summary))


def classifier_table(summary: Summary) -> Grid:
    """Classifiers down, then both ensembles and the baseline; accuracy and costs across."""
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
    made.caption = summary.verdict("self-distillation") or ""
    return made
