"""`shoal sweep`. It reads what can be swept from the definitions of the other commands."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from shoal.cli.options import Json, grid, show
from shoal.cli.signals import counting
from shoal.errors import TRY_AGAIN, ShoalError
from shoal.storage.run import Run
from shoal.sweep.box import Box
from shoal.sweep.cluster import RayExecutor
from shoal.sweep.command import OWN, Command, Option
from shoal.sweep.engine import STOPPED, WAITING, Sweep
from shoal.sweep.folder import Folder
from shoal.sweep.grid import read_grid
from shoal.sweep.processes import Executor, LocalExecutor, cores, count_slots, visible_gpus
from shoal.sweep.results import HEADS, Results, group_rows, summary
from shoal.sweep.table import showing


def commands(app: Any) -> dict[str, Command]:
    """The commands of a typer group that can be swept.

    These are all commands that write a run folder, stop at checkpoints and can be resumed.
    """
    described = {name: _described(name, command) for name, command in app.commands.items() if name != sweep.__name__}
    return {name: command for name, command in described.items() if set(OWN) <= set(command.options)}


def _described(name: str, command: Any) -> Command:
    options = {_name(p): _option(p) for p in command.params if p.param_type_name == "option"}
    arguments = tuple(p.name for p in command.params if p.param_type_name == "argument")

    def check(words: Sequence[str]) -> None:
        try:
            command.make_context(name, list(words))  # parses the words and converts the values, but runs nothing
        except typer.BadParameter as error:
            raise ShoalError(
                f"found that shoal {name} refuses {' '.join(words)}: {error.format_message()}; see shoal {name} --help"
            ) from error

    return Command(name, arguments, options, check)


def _name(parameter: Any) -> str:
    """What a grid file calls an option: what is typed, without the dashes."""
    long = next((name for name in parameter.opts if name.startswith("--")), parameter.opts[0])
    return str(long).lstrip("-").replace("-", "_")


def _option(parameter: Any) -> Option:
    off = parameter.secondary_opts[0] if parameter.secondary_opts else None
    return Option(parameter.opts[-1], off, bool(parameter.is_flag), bool(parameter.multiple))


def executor(workers: int | None, per_gpu: int | None, address: str | None) -> Executor:
    """The executor for the runs. Raises ShoalError when the cluster or the GPUs that it needs are missing."""
    if address is not None:
        return RayExecutor(address, workers, per_gpu)
    gpus = visible_gpus(os.environ, torch.cuda.device_count())
    return LocalExecutor(count_slots(workers, per_gpu, len(gpus), cores()), gpus)


def sweep(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="GRID", help="A YAML file with stages, their options and their grids.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for all runs; must be new or empty, unless --resume.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[STAGE.]OPTION=VALUE",
            help="Set an option in every stage that has it, or in one, instead of GRID (repeatable; VALUE is YAML).",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of runs at once; they share the cores. Default: the number of cores.")
    ] = None,
    per_gpu: Annotated[
        int | None, typer.Option(help="Number of runs at once on each GPU (with `device: cuda`).")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Run on a Ray cluster: its host:port, or local to start one here (extra `sweep`)."),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            help="Time for the whole sweep; runs stop at checkpoints before it ends, and --resume continues them."
        ),
    ] = None,
    retries: Annotated[int, typer.Option(help="How often a run is restarted after its worker was killed.")] = 2,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep in --out; finished runs are not repeated.")
    ] = False,
    json: Json = False,
) -> None:
    """Run a grid of train and reduce commands, and print mean and spread over seeds.

    Finished runs are not repeated. A run whose worker was killed continues from its last checkpoint. Ctrl-C stops all
    runs at a checkpoint after their current step; a second Ctrl-C kills them. The exit status is 1 when a run failed,
    and 75 when --resume can continue all unfinished runs. docs/sweeps.md has an example.
    """
    box = Box(max_seconds)  # made first, because reading the file and connecting to a cluster count, too
    if retries < 0:
        raise ShoalError(f"found --retries {retries}; need 0 or more; leave it out for 2")
    assert context.parent is not None
    runs = read_grid(file, commands(context.parent.command), out, set_ or ())
    folder = Folder(out)
    folder.check(runs, resume)
    console = Console(stderr=True)
    with closing(executor(workers, per_gpu, ray)) as place, folder.opened(runs), showing(console) as watch:
        said = "stopping all runs at checkpoints; a second signal or Ctrl-C kills them"
        with counting(signal.SIGINT, signal.SIGTERM, said=said) as asked:
            records = Sweep(folder, runs, place, retries, box).run(watch, asked)
    body = summary(records)
    Run(out).write_json("sweep.json", body)
    show(body, json, lambda: grid(str(out), HEADS, group_rows(body)))
    _report_unfinished(body, console)


def _report_unfinished(body: Results, console: Console) -> None:
    """Print the runs that did not finish, with the last lines of their logs.

    Exits with status 75 when all of them can be resumed, and otherwise with 1.
    """
    later = [row for row in body["runs"] if row["state"] in (STOPPED, WAITING)]
    for row in body["runs"]:
        if row["run"] in body["unfinished"]:
            console.print(f"{row['state']} {row['run']}", *row["error"], sep="\n  ", markup=False, highlight=False)
    if later:
        console.print(
            f"{len(later)} of {len(body['runs'])} runs stopped or waiting: --resume continues them", highlight=False
        )
    if body["unfinished"]:
        raise typer.Exit(TRY_AGAIN if len(later) == len(body["unfinished"]) else 1)
