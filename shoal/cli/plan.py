"""The command that plans a reduction. `app` gives it its name."""

from __future__ import annotations

from shoal.cli.fields import expanded
from shoal.cli.options import Json, grid, show
from shoal.jobs import plan as job
from shoal.progress import status


@expanded
def plan(request: job.Request, json: Json = False) -> None:
    """Find networks that meet a target before training any: ReLU budgets, replaced blocks, an exit, other shapes.

    Columns: ReLUs, MACs and convolutions on the longest path that are left; seconds, MB both ways and one-way
    latencies of the mode; blocks that become one convolution, and "exit" where the early exit is deployed; points of
    accuracy that published networks lost; width x resolution where they are scaled.

    Every candidate has as many ReLUs as the target allows. They are ordered by the accuracy that published networks
    lost with the same changes (percentage points on CIFAR-100): an order, not a forecast for your data. Train one with
    shoal reduce TEACHER --plan FILE.
    """
    with status() as say:
        body = job.plan(request, say)
    show(body, json, lambda: grid(f"{request.target} within {request.wanted()}", *job.table(body)))
