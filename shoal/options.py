"""What the command line's parts share: options, and how results are shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shoal import commands
from shoal.errors import ShoalError

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DataDir = Annotated[Path | None, typer.Option(help="Where the data set lies in its published layout.")]
Out = Annotated[Path, typer.Option(help="The folder to write; it must be new or empty, unless --resume.")]
Seed = Annotated[int, typer.Option(help="Decides initial weights, batches and the validation split.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16 (autocast).")]
MaxSeconds = Annotated[
    float | None, typer.Option(help="Stop at a checkpoint before this many seconds, all stages together.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of --out.")]
Epochs = Annotated[int | None, typer.Option(help="Instead of the preset's number.")]
ShardMb = Annotated[
    float | None,
    typer.Option("--shard-mb", help="Write weights and optimiser state in files of at most this many MB."),
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events (extra).")]
Replace = Annotated[
    list[str] | None,
    typer.Option("--replace", help="Exchange layers first, such as relu6=relu,max_pool=avg_pool (repeatable)."),
]


def show(body: Any, as_json: bool, table: Callable[[], Any]) -> None:
    """Print `body` as JSON, or what `table` makes of it; under torchrun only the first process speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        sys.stdout.write(commands.dump(body) + "\n")
    else:
        Console().print(table())


def numbers(text: str | None, option: str) -> tuple[float, ...]:
    """Numbers that commas part; none for None. Raises ShoalError for anything else."""
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError as error:
        raise ShoalError(f"found {option} {text!r}; need numbers with commas between them, such as 0.5,1") from error


def grid(title: str, head: list[str], rows: list[list[str]]) -> Table:
    """A table; every column but the first is right-aligned."""
    table = Table(title=escape(title), header_style="bold")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(escape, row))  # names of folders and layers are no markup
    return table


def pairs(title: str, body: dict[str, Any]) -> Table:
    """Plain values of `body`, a row each."""
    rows = [
        [k, f"{v:,.4g}" if isinstance(v, float) else str(v)] for k, v in body.items() if not isinstance(v, (dict, list))
    ]
    return grid(title, ["", ""], rows)
