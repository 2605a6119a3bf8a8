"""`shoal inplace` and `shoal anytime`: train several exits or widths at once, and evaluate each."""

from __future__ import annotations

from collections.abc import Mapping

from shoal import units
from shoal.cli.fields import expanded
from shoal.cli.options import Json, grid, show, trains
from shoal.jobs import inplace as job
from shoal.jobs.options import Shared
from shoal.recipes.inplace import Options
from shoal.report.layout import Grid
from shoal.report.tables import remarks_on_tests
from shoal.storage.summary import Summary


@trains
def inplace(request: job.Request, options: Options, *, shared: Shared, json: Json = False) -> None:
    """Train all exits or widths of a network at once; the stronger ones teach the weaker (IPKD-TA).

    Each classifier has a run folder, OUT/exits/1, ... or OUT/widths/0.25, ..., for shoal evaluate and compile. OUT
    holds the network with all exits, or the widest one; anytime.json and anytime.png there show accuracy against
    multiply-adds.

    Example: shoal inplace mobilenetv1 --data cifar100 --widths 0.25,0.5,0.75,1 --out runs/widths
    """
    summary, worth = job.train(request, options, shared)
    show(summary.as_json() | {"anytime": worth["anytime"]}, json, lambda: _trained_table(summary, worth))


def _trained_table(summary: Summary, worth: job.Anytime) -> Grid:
    """`anytime_table`, with the largest and last test accuracies of the classifiers, if measured, in the caption."""
    made = anytime_table(worth)
    if isinstance(summary.classifiers, Mapping):
        made.caption = "\n".join(remarks_on_tests(summary.classifiers))
    return made


@expanded
def anytime(wanted: job.Evaluation, json: Json = False) -> None:
    """Show accuracy and multiply-adds of every exit or width, and of early exits within a budget.

    Confidence thresholds are chosen on the validation split. Writes anytime.json and anytime.png into the run.
    """
    body = job.anytime(wanted)
    show(body, json, lambda: anytime_table(body))


def anytime_table(body: job.Anytime) -> Grid:
    """A table of each classifier's accuracy and multiply-adds, and below it those within each budget."""
    rows = [_cells(r["name"], r["accuracy"], r["macs"], units.millions(r["macs_in_order"])) for r in body["anytime"]]
    for row in body.get("budgets", ()):
        rows.append(_cells(f"budget of {units.millions(row['budget'])}", row["accuracy"], row["macs"], ""))
    head = ["classifier", "test accuracy, %", "MACs, millions", "MACs with all weaker ones, millions"]
    return grid(f"{body['model']} on {body['data']}", head, rows)


def _cells(name: str, accuracy: float, own: float, in_order: str) -> list[str]:
    return [name, units.percent(accuracy), units.millions(own), in_order]
