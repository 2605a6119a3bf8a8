"""What the command line's parts share: options, and how results are shown."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from shoal.cli.signals import until_terminated
from shoal.errors import ShoalError
from shoal.jobs.inputs import Shared
from shoal.report.layout import grid as grid
from shoal.report.layout import pairs as pairs

Preset = Annotated[
    str,
    typer.Option(
        help="Schedules and losses: quick, paper or reference-code; to train a teacher for deepreduce, "
        "deepreduce-paper or deepreduce-paper-cifar10; with --recipe deepreduce quick, paper or paper-cifar10."
    ),
]


def dump(body: Any) -> str:
    """JSON for `--json`."""
    return json.dumps(body, indent=1, default=str)


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DataDir = Annotated[Path | None, typer.Option(help="Where the data set lies in its published layout.")]
Seed = Annotated[int, typer.Option(help="Decides initial weights, batches and the validation split.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Epochs = Annotated[int | None, typer.Option(help="Instead of the preset's number.")]
Replace = Annotated[
    list[str] | None,
    typer.Option("--replace", help="Exchange layers first, such as relu6=relu,max_pool=avg_pool (repeatable)."),
]
Out = Annotated[Path, typer.Option(help="The folder to write; it must be new or empty, unless --resume.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16 (autocast).")]
Step = Annotated[
    str, typer.Option(help="How a step runs: eager, compiled, graph (a CUDA graph) or compiled-graph; see docs/gpu.md.")
]
MaxSeconds = Annotated[
    float | None, typer.Option(help="Stop at a checkpoint before this many seconds, all stages together.")
]
SaveSeconds = Annotated[
    float, typer.Option(help="Seconds between checkpoints at least; 0 is after each epoch. A stop always writes one.")
]
ShardMb = Annotated[
    float | None,
    typer.Option("--shard-mb", help="Write weights and optimiser state in files of at most this many MB."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of --out.")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events (extra).")]
SHARED: dict[str, tuple[Any, Any]] = {
    "out": (Out, Parameter.empty),
    "device": (Device, "cpu"),
    "precision": (Precision, "fp32"),
    "step": (Step, "eager"),
    "max_seconds": (MaxSeconds, None),
    "save_seconds": (SaveSeconds, 0.0),
    "shard_mb": (ShardMb, None),
    "resume": (Resume, False),
    "tensorboard": (TensorBoard, False),
}
"""Options of all commands that train, with their defaults."""


def trains(command: Callable[..., None]) -> Callable[..., None]:
    """`command` for typer, its parameter `shared` exchanged for the options that make one.

    A seed of its own goes into `shared`, too. SIGTERM has it stop at a checkpoint.
    """

    @functools.wraps(command)
    def run(**values: Any) -> None:
        own = {name: value for name, value in values.items() if name not in SHARED}
        rest = {name: value for name, value in values.items() if name in SHARED}
        with until_terminated() as stop:
            command(**own, shared=Shared(seed=values.get("seed") or 0, stop=stop, **rest))

    parameters: list[Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        parameters += _shared() if parameter.name == "shared" else [parameter.replace(kind=Parameter.KEYWORD_ONLY)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _shared() -> list[Parameter]:
    return [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in SHARED.items()
    ]


def show(body: Any, as_json: bool, table: Callable[[], Any]) -> None:
    """Print `body` as JSON, or what `table` makes of it; under torchrun only the first process speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        sys.stdout.write(dump(body) + "\n")
    else:
        Console().print(table())


def numbers(text: str | None, option: str) -> tuple[float, ...]:
    """Numbers that commas part; none for None. Raises ShoalError for anything else."""
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else ()
    except ValueError as error:
        raise ShoalError(f"found {option} {text!r}; need numbers with commas between them, such as 0.5,1") from error
