"""The command that shows runs side by side. `app` gives it its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.options import Json, show
from shoal.jobs import report as job


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders with a summary.json.")],
    csv: Annotated[Path | None, typer.Option(help="Also write the rows as CSV.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page with all charts.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw accuracy against ReLUs with the front.")] = None,
    link: Annotated[
        str | None,
        typer.Option(
            "--link", "--network", help="Forecast online seconds over none, lan or wan (the page: none unless given)."
        ),
    ] = None,
    machine: Annotated[Path | None, typer.Option(help="Constants for forecasts, from `shoal calibrate`.")] = None,
    json: Json = False,
) -> None:
    """One table over runs, and each run's training curves as curves.png in its folder.

    The page (--html) holds Pareto fronts, the papers' points beside ours, per-site budgets, curves, and every figure as
    a table; it loads nothing from outside. Runs that differ by seed only are one point, with their spread.
    """
    body = job.report(runs, job.Asked(csv, html, png, link, machine))
    show(body, json, lambda: job.report_table(body))
