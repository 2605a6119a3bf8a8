"""`shoal distill`: OSAKD and the methods that it is compared with."""

from __future__ import annotations

from shoal import units
from shoal.cli.options import Json, grid, show, trains
from shoal.jobs.distill import Neighbours, Request, Teaching
from shoal.jobs.distill import distill as run_distill
from shoal.jobs.options import Shared
from shoal.report.layout import Grid
from shoal.report.tables import remarks_on_tests
from shoal.storage.summary import Summary


@trains
def distill(
    teaching: Teaching, request: Request, neighbours: Neighbours, *, shared: Shared, json: Json = False
) -> None:
    """Train a network by distillation: from a teacher, from other networks, or from samples with similar outputs.

    A baseline is trained as well: the same network by cross-entropy alone, from the same weights, on the same batches
    and for as many epochs. OUT holds the distilled network alone, for shoal evaluate, reduce and compile.

    Example: shoal distill kd resnet20 --teacher runs/teacher --out runs/kd
    """
    summary = run_distill(teaching, request, neighbours, shared)
    show(summary.as_json() | {"lost": summary.lost}, json, lambda: table(summary))


def table(summary: Summary) -> Grid:
    """A table of baseline, distilled network and teacher; the caption has all classifiers trained together."""
    method = str(summary.method)
    found = {"baseline": summary.baseline, method: summary.reduced, "teacher": summary.teacher}
    rows = [
        [name, units.percent(row["accuracy"]), *map(units.count, (row["params"], row["macs"], row["relus"]))]
        for name, row in found.items()
        if row is not None
    ]
    title = f"{summary.model} on {summary.data}, seed {summary.seed}"
    made = grid(title, ["", "test accuracy, %", "parameters", "MACs", "ReLUs"], rows)
    remarks = [summary.verdict(method), *remarks_on_tests({"baseline": summary.baseline, method: summary.reduced})]
    if isinstance(summary.classifiers, list) and len(summary.classifiers) > 1:
        accuracies = ", ".join(map(units.percent, summary.classifiers))
        remarks.append(f"test accuracy of all classifiers that were trained together, %: {accuracies}")
    made.caption = "\n".join(remark for remark in remarks if remark)
    return made
