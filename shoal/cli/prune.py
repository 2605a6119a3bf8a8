"""`shoal prune`."""

from __future__ import annotations

from shoal import units
from shoal.cli.options import Json, grid, show, trains
from shoal.exits.records import PruneRow
from shoal.jobs import prune as job
from shoal.jobs.options import Shared


@trains
def prune(request: job.Request, *, shared: Shared, json: Json = False) -> None:
    """Prune weights, filters or channels of a trained network by several amounts, and train each result further.

    Pruned weights and filters become zeros in layers of the same size, so MACs stay the same. Channels are cut out,
    which reduces MACs, ReLUs and parameters; such a network can be compiled and served, and without exits also reduced,
    like any other. Each amount has a run folder, such as OUT/amount-0.5. OUT/pruning.json and pruning.png show accuracy
    against weights left. Prune a network with self-distillation and one without it to repeat Fig. 6 of the
    self-distillation paper.
    """
    body = job.prune_by_amounts(request, shared)
    rows = [_cells(row) for row in body["rows"]]
    heads = ["fraction pruned", "weights left", "MACs", "ReLUs", "test accuracy of each exit, %"]
    show(body, json, lambda: grid(f"{request.run}: {request.method} pruned", heads, rows, texts=()))


def _cells(row: PruneRow) -> list[str]:
    left = map(units.count, (row["weights"], row["macs"], row["relus"]))
    return [f"{row['amount']:g}", *left, "  ".join(map(units.percent, row["accuracy"]))]
