"""The command that prunes a network. `app` gives it its name."""

from __future__ import annotations

from shoal import units
from shoal.cli.options import Json, grid, show, trains
from shoal.exits.records import PruneRow
from shoal.jobs import prune as job
from shoal.jobs.inputs import Shared


@trains
def prune(request: job.Request, *, shared: Shared, json: Json = False) -> None:
    """Prune a trained network by magnitude and train it further, by several amounts.

    Compare a network with self-distillation and one without it: the paper's Fig. 6. Pruned weights and filters are
    zeros in layers of the same size, so MACs stay the same. Channels are cut out, which reduces MACs, ReLUs and
    parameters; such a network can be compiled, served and, without exits, reduced like any other. OUT/amount-0.5 and so
    on are runs of their own; OUT/pruning.json and pruning.png hold accuracy against weights left.
    """
    body = job.prune_by_amounts(request, shared)
    rows = [_cells(row) for row in body["rows"]]
    heads = ["fraction pruned", "weights left", "MACs", "ReLUs", "test accuracy of each exit, %"]
    show(body, json, lambda: grid(f"{request.run}: {request.method} pruned", heads, rows, texts=()))


def _cells(row: PruneRow) -> list[str]:
    left = map(units.count, (row["weights"], row["macs"], row["relus"]))
    return [f"{row['amount']:g}", *left, "  ".join(map(units.percent, row["accuracy"]))]
