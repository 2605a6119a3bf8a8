"""`shoal distill`: OSAKD and the methods that it is compared with."""

from __future__ import annotations

from shoal import units
from shoal.cli.options import Json, grid, show, trains
from shoal.jobs.distill import Neighbours, Request, Teaching
from shoal.jobs.distill import distill as run_distill
from shoal.jobs.inputs import Shared
from shoal.report.layout import Grid
from shoal.storage.summary import Summary


@trains
def distill(
    teaching: Teaching, request: Request, neighbours: Neighbours, *, shared: Shared, json: Json = False
) -> None:
    """Train a network by distillation: from its own neighbours, from a teacher, or together with other networks.

    The same network is also trained by cross-entropy alone, as long, from the same weights and on the same batches.
    OUT holds the taught network without what taught it; shoal evaluate, reduce and compile take it.
    """
    summary = run_distill(teaching, request, neighbours, shared)
    show(summary.as_json() | {"lost": summary.lost}, json, lambda: table(summary))


def table(summary: Summary) -> Grid:
    """Baseline, taught network and teacher, and every classifier that was trained."""
    method = str(summary.method)
    found = {"baseline": summary.baseline, method: summary.reduced, "teacher": summary.teacher}
    rows = [
        [name, units.percent(row["accuracy"]), *map(units.count, (row["params"], row["macs"], row["relus"]))]
        for name, row in found.items()
        if row is not None
    ]
    title = f"{summary.model} on {summary.data}, seed {summary.seed}"
    made = grid(title, ["", "test accuracy, %", "parameters", "MACs", "ReLUs"], rows)
    remarks = [summary.verdict(method)]
    if isinstance(summary.classifiers, list) and len(summary.classifiers) > 1:
        accuracies = ", ".join(map(units.percent, summary.classifiers))
        remarks.append(f"test accuracy of all classifiers that were trained together, %: {accuracies}")
    made.caption = "\n".join(remark for remark in remarks if remark)
    return made
