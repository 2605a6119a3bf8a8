"""Options of several commands, and the printing of results."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from shoal.cli.fields import expanded
from shoal.cli.signals import until_stopped
from shoal.jobs.options import Shared
from shoal.report.layout import grid as grid
from shoal.report.layout import pairs as pairs


def dump(body: Any) -> str:
    """`body` as JSON text for `--json`."""
    return json.dumps(body, indent=1, default=str)


DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder with the files of the data set, laid out as published; the run's own if left out."),
]
Device = Annotated[str, typer.Option(help="Device to compute on: cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def trains(command: Callable[..., None]) -> Callable[..., None]:
    """`command` for typer, as `expanded` makes it; on SIGTERM or Ctrl-C it stops at a checkpoint.

    Its parameter `shared` has the options of all commands that train.
    """

    @functools.wraps(command)
    def stoppable(*, shared: Shared, **values: Any) -> None:
        with until_stopped() as stop:
            command(shared=replace(shared, stop=stop), **values)

    return expanded(stoppable)


def show(body: Any, as_json: bool, table: Callable[[], Any]) -> None:
    """Print `body` as JSON, or the table that `table` returns. Under torchrun only the first process prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        sys.stdout.write(dump(body) + "\n")
    else:
        Console().print(table())
