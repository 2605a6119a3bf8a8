"""`shoal sweep`. The options that a grid may set are read from the definitions of the other commands."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from shoal.cli.fields import expanded
from shoal.cli.options import Json, grid, show
from shoal.cli.signals import counting
from shoal.errors import TRY_AGAIN, ShoalError
from shoal.storage.run import Run
from shoal.sweep.box import Box
from shoal.sweep.cluster import RayExecutor
from shoal.sweep.command import OWN, Command, Option
from shoal.sweep.engine import STOPPED, WAITING, Sweep
from shoal.sweep.folder import Folder
from shoal.sweep.grid import Planned, read_grid
from shoal.sweep.processes import Executor, LocalExecutor, cores, count_slots, visible_gpus
from shoal.sweep.results import HEADS, Results, group_rows, remarks_on_tests, summary
from shoal.sweep.table import showing


def commands(app: Any) -> dict[str, Command]:
    """The commands of a typer group that a sweep can run.

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
    """The name of an option in a grid file: as it is typed, without the leading dashes, and with _ for -."""
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


@dataclass(frozen=True)
class Request:
    """The options of `shoal sweep`."""

    file: Path = field(metadata={"cli": "argument"})
    """The grid: a YAML file with stages, their options, and lists of values to combine; see docs/sweeps.md."""
    out: Path
    """The folder for all runs. It must be new or empty, unless --resume is given."""
    set: tuple[str, ...] = ()
    """Use this value instead of the file's: OPTION=VALUE in all stages that have the option, or STAGE.OPTION=VALUE in
    one stage, such as epochs=2 (repeatable; VALUE is YAML)."""
    workers: int | None = None
    """Number of runs at the same time, which share the cores; the number of cores if left out."""
    per_gpu: int | None = None
    """Number of runs at the same time on each GPU, for runs with `device: cuda`."""
    ray: str | None = None
    """Run on a Ray cluster: its host:port, or local to start one on this machine (needs shoal[sweep])."""
    max_seconds: float | None = None
    """Time limit of the whole sweep in seconds; runs stop at checkpoints before it, and --resume continues them."""
    retries: int = 2
    """Number of times that a run is restarted after its worker was killed."""
    resume: bool = False
    """Continue the sweep in --out; finished runs are not repeated."""

    def check(self) -> None:
        """Raise ShoalError for a negative number of retries."""
        if self.retries < 0:
            raise ShoalError(f"found --retries {self.retries}; need 0 or more; leave it out for 2")


@expanded
def sweep(context: typer.Context, request: Request, json: Json = False) -> None:
    """Run a grid of train, reduce and other commands; show mean and spread over seeds.

    Finished runs are not repeated. A run whose worker was killed continues from its last checkpoint. Ctrl-C stops all
    runs at a checkpoint after their current step; a second Ctrl-C kills them. The exit status is 1 when a run failed,
    and 75 when --resume can continue all unfinished runs. docs/sweeps.md has an example.
    """
    box = Box(request.max_seconds)  # made first, because reading the file and connecting to a cluster count, too
    request.check()
    assert context.parent is not None
    runs = read_grid(request.file, commands(context.parent.command), request.out, request.set)
    body = _run(request, runs, box)
    remarks = "\n".join(remarks_on_tests(body))
    show(body, json, lambda: grid(str(request.out), HEADS, group_rows(body), caption=remarks))
    _report_unfinished(body, Console(stderr=True))


def _run(request: Request, runs: Sequence[Planned], box: Box) -> Results:
    """Run what is not finished, and write sweep.json."""
    folder, console = Folder(request.out), Console(stderr=True)
    folder.check(runs, request.resume)
    place = executor(request.workers, request.per_gpu, request.ray)
    with closing(place), folder.opened(runs), showing(console) as watch:
        said = "stopping all runs at checkpoints; a second signal or Ctrl-C kills them"
        with counting(signal.SIGINT, signal.SIGTERM, said=said) as asked:
            records = Sweep(folder, runs, place, request.retries, box).run(watch, asked)
    body = summary(records)
    Run(request.out).write_json("sweep.json", body)
    return body


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
