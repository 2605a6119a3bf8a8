"""`shoal plan`."""

from __future__ import annotations

from shoal.cli.fields import expanded
from shoal.cli.options import Json, grid, show
from shoal.costs.plan import Planned
from shoal.jobs import plan as job
from shoal.progress import status
from shoal.report.layout import Grid


@expanded
def plan(request: job.Request, json: Json = False) -> None:
    """Find networks that meet a limit in seconds, bytes or ReLUs, before training any.

    A candidate is a ReLU budget, possibly with replaced blocks, with the auxiliary classifier in place of the final
    one, or with another size. Each has as many ReLUs as the limit allows. Candidates are ordered by the accuracy that
    published networks lost with the same changes, in percentage points on CIFAR-100. Use the loss for this order only:
    it is not a forecast for your data. Train a candidate with shoal reduce TEACHER --plan FILE.

    Columns: ReLUs, MACs and depth (convolutions on the longest path) of the candidate; seconds, MB (both directions)
    and one-way latencies (messages that have to wait for each other) of --mode; the number of blocks that become one
    convolution, with "exit" if the auxiliary classifier is deployed; lost, the percentage points by which candidates
    are ordered; width x resolution if candidates are scaled. The --json output describes the same fields.

    Example: shoal plan runs/teacher --target 0.5s --link lan --out plan.json
    """
    with status() as say:
        body = job.plan(request, say)
    show(body, json, lambda: plan_table(request, body))


def plan_table(request: job.Request, body: Planned) -> Grid:
    """The candidates as a table with a footnote."""
    return grid(f"{request.target} within {request.wanted()}", *job.table(body), caption=job.footnote(body))
