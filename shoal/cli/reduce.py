"""`shoal reduce`."""

from __future__ import annotations

from shoal.cli.options import Json, show, trains
from shoal.jobs import deepreduce as grid
from shoal.jobs import reduce as job
from shoal.jobs.options import Shared
from shoal.recipes import shallow
from shoal.report import comparison_table


@trains
def reduce(choices: shallow.Choices, request: job.Request, *, shared: Shared, json: Json = False) -> None:
    """Reduce a trained network to a ReLU budget.

    --recipe shallow (the default) has three stages: it measures the sensitivity of each ReLU layer, learns which ReLUs
    to keep, and fine-tunes the network with replaced blocks and an auxiliary classifier. Instead of --budget, give
    --plan a file of shoal plan, made for a limit in seconds, bytes or ReLUs. The result is shown next to the teacher.
    The MACs of replaced blocks are counted in two ways: as they are, and as in the paper.

    --recipe deepreduce measures how much the ReLUs of each stage of the network matter, and then trains a grid of
    designs (variants of the network) by distillation, 5 (D - 1) for D stages: whole stages without ReLUs, every other
    ReLU layer removed, half the channels, half the resolution. Each design is a run in OUT/designs; OUT/front.json and
    front.png show the Pareto front of ReLUs and validation accuracy. OUT holds the design with the highest validation
    accuracy among those with at most --budget ReLUs. --resume continues an interrupted run, and can also add --designs
    or change --budget.

    Example: shoal reduce runs/teacher --budget 49600 --out runs/reduced
    """
    if request.recipe == "deepreduce":
        summary = grid.reduce_by_grid(request, choices, shared)
        return show(summary.as_json(), json, lambda: grid.front_table(summary))
    summary = job.reduce(request, choices, shared)
    show(summary.as_json(), json, lambda: comparison_table(summary))
