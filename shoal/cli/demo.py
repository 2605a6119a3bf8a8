"""The command that shows the whole way. `app` gives it its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.options import Json, Seed, show
from shoal.jobs import demo as job
from shoal.report import comparison_table


def demo(
    out: Annotated[Path, typer.Option(help="The run folder to write.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    images: Annotated[int, typer.Option(help="Test images queried between the two processes.")] = 32,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train, reduce, fold and privately run a network on scikit-learn's digits; under 6 minutes on two cores."""
    body = job.demo(out, overwrite, images, seed)
    show(body, json, lambda: comparison_table(body))
