"""`shoal report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.fields import expanded
from shoal.cli.options import Json, show
from shoal.jobs import report as job


@expanded
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, also of a teacher alone, and folders of sweeps.")],
    asked: job.Asked,
    json: Json = False,
) -> None:
    """Compare runs in a table, and with --html, --csv or --png also in a page, a CSV file or a plot.

    The page has Pareto fronts with the published results of the papers, the number of ReLUs kept in each ReLU layer,
    training curves, and all figures as tables; it works offline. Runs that differ only by seed are one point, with mean
    and spread. Each run's training curves are also drawn to RUN/curves.png.
    """
    body = job.report(runs, asked)
    show(body, json, lambda: job.report_table(body))
