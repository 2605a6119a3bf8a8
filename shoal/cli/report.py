"""The command that shows runs side by side. `app` gives it its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.fields import expanded
from shoal.cli.options import Json, show
from shoal.jobs import report as job


@expanded
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders with a summary.json.")],
    asked: job.Asked,
    json: Json = False,
) -> None:
    """Compare runs in one table, and draw each run's training curves into its folder.

    The page (--html) holds Pareto fronts, the papers' points beside ours, budgets by site, curves, and every figure as
    a table; it loads nothing from outside. Runs that differ only by seed are one point, with their spread.
    """
    body = job.report(runs, asked)
    show(body, json, lambda: job.report_table(body))
