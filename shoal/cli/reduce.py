"""The command that reduces a network. `app` gives it its name."""

from __future__ import annotations

from shoal.cli.options import Json, show, trains
from shoal.jobs import deepreduce as grid
from shoal.jobs import reduce as job
from shoal.jobs.inputs import Shared
from shoal.recipes import shallow
from shoal.report import comparison_table


@trains
def reduce(choices: shallow.Choices, request: job.Request, *, shared: Shared, json: Json = False) -> None:
    """Reduce a trained network to a ReLU budget.

    --recipe shallow (the default) measures sensitivities, learns which ReLUs to keep, and fine-tunes with replaced
    blocks and an auxiliary classifier. Instead of --budget, --plan takes a plan that shoal plan made for a limit in
    seconds, bytes or ReLUs. Prints the baseline beside the reduced network, and the MACs of replaced blocks as they are
    and as the paper counts them.

    --recipe deepreduce measures how much each stage's ReLUs matter, then trains 5 (D - 1) designs by distillation:
    with whole stages without ReLUs, every other ReLU layer removed, half the channels, half the resolution. Each design
    is a run in OUT/designs; OUT/front.json and front.png hold the Pareto front of ReLUs against validation accuracy.
    OUT itself is the design with the highest validation accuracy at or below --budget. --resume continues after a
    kill, and also trains further --designs or chooses by another --budget.
    """
    if request.recipe == "deepreduce":
        summary = grid.reduce_by_grid(request, choices, shared)
        return show(summary.as_json(), json, lambda: grid.front_table(summary))
    summary = job.reduce(request, choices, shared)
    show(summary.as_json(), json, lambda: comparison_table(summary))
