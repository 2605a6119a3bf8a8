"""`shoal plan`."""

from __future__ import annotations

from shoal.cli.fields import expanded
from shoal.cli.options import Json, grid, show
from shoal.jobs import plan as job
from shoal.progress import status


@expanded
def plan(request: job.Request, json: Json = False) -> None:
    """Find networks that meet a limit in seconds, bytes or ReLUs, before training any.

    A candidate is a ReLU budget, with replaced blocks, the auxiliary classifier or another size. Each has as many ReLUs
    as the limit allows. Candidates are ordered by the accuracy that published networks lost with the same changes, in
    percentage points on CIFAR-100. Use this as an order only: it is not a forecast for your data. Train one with shoal
    reduce TEACHER --plan FILE.

    Columns: ReLUs, MACs and depth (convolutions on the longest path) of the candidate; seconds, MB in both directions
    together, and one-way latencies of --mode; the number of blocks that become one convolution, with "exit" if the
    auxiliary classifier is deployed; the lost points; width x resolution if candidates are scaled.

    Example: shoal plan runs/teacher --target 0.5s --link lan --out plan.json
    """
    with status() as say:
        body = job.plan(request, say)
    show(body, json, lambda: grid(f"{request.target} within {request.wanted()}", *job.table(body)))
