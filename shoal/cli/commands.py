"""The commands by name, each imported when it is needed."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any

import typer

from shoal.progress import set_verbosity


@dataclass(frozen=True)
class Entry:
    """Where a command is, and its line in the list of commands."""

    module: str
    function: str
    line: str


GROUPS: dict[str, dict[str, Entry]] = {
    "Inspect": {
        "demo": Entry("demo", "demo", "Reduce and privately run a network trained on digits."),
        "count": Entry("inspect", "count", "Count ReLUs, MACs, conv depth and parameters of a network."),
        "check": Entry("inspect", "check", "Say what a network costs and what cannot run in private."),
        "evaluate": Entry("inspect", "evaluate", "Test accuracy and counts of a run's network."),
        "report": Entry("report", "report", "Compare runs in one table, as a page, CSV or plot."),
        "analyse": Entry("analyse", "analyse", "Study a network's exits, features and gradients."),
    },
    "Train and reduce": {
        "train": Entry("train", "train", "Train a network with all of its ReLUs."),
        "reduce": Entry("reduce", "reduce", "Reduce a trained network to a ReLU budget."),
        "self-distill": Entry("self_distill", "self_distill", "Train a network whose last exit teaches the others."),
        "inplace": Entry("inplace", "inplace", "Train all exits or widths of a network at once."),
        "anytime": Entry("inplace", "anytime", "Show accuracy against cost of every exit or width."),
        "distill": Entry("distill", "distill", "Train a network by a teacher, by peers, or by neighbours."),
        "exits": Entry("exits", "exits", "Choose thresholds at which images leave early."),
        "export": Entry("exits", "export", "Write a network with exits as ONNX, one file a stage."),
        "prune": Entry("prune", "prune", "Prune weights or channels, and train again."),
        "sweep": Entry("sweep", "sweep", "Run a grid of these commands, and show mean and spread."),
    },
    "Deploy and serve": {
        "compile": Entry("query", "compile_", "Compile a run's network for private inference."),
        "certs": Entry("query", "certs", "Make test certificates for mutual TLS."),
        "serve": Entry("serve", "serve", "Run the server, which holds the weights."),
        "prepare": Entry("query", "prepare", "Make randomness with the server, ahead of queries."),
        "query": Entry("query", "query", "Ask the server to classify images that it never sees."),
    },
    "Measure and plan": {
        "plan": Entry("plan", "plan", "Find networks that meet a limit in seconds, bytes or ReLUs."),
        "cost": Entry("costs", "cost", "Forecast a private inference before compiling."),
        "calibrate": Entry("costs", "calibrate", "Measure this machine's constants for forecasts."),
        "bench": Entry("costs", "bench", "Time prepared queries over a simulated LAN or WAN."),
    },
}
"""The commands, in the groups and the order in which `shoal --help` lists them."""

HELP_NAMES = {"help_option_names": ["-h", "--help"]}


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; results and errors only.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Show the log; -vv also shows where an error arose.")
]


def with_verbosity(command: Callable[..., None]) -> Callable[..., None]:
    """`command` for typer with the options --quiet and --verbose, which all commands take."""

    @functools.wraps(command)
    def run(*, quiet: bool, verbose: int, **values: Any) -> None:
        if quiet or verbose:
            set_verbosity(-1 if quiet else verbose)
        command(**values)

    own = list(inspect.signature(command, eval_str=True).parameters.values())
    kinds = {"quiet": (Quiet, False), "verbose": (Verbose, 0)}
    more = [Parameter(name, Parameter.KEYWORD_ONLY, default=d, annotation=kind) for name, (kind, d) in kinds.items()]
    parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in own] + more
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


ENTRIES = {name: entry for group in GROUPS.values() for name, entry in group.items()}


class Commands(MutableMapping[str, Any]):
    """The commands by name. Each is imported when it is looked up, so that help and other commands start quickly."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.made:
            entry = ENTRIES[name]
            function = getattr(importlib.import_module(f"shoal.cli.{entry.module}"), entry.function)
            one = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=HELP_NAMES)
            one.command(name, context_settings=HELP_NAMES)(with_verbosity(function))
            self.made[name] = typer.main.get_command(one)
        return self.made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self.made[name] = command

    def __delitem__(self, name: str) -> None:
        del self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(ENTRIES)

    def __len__(self) -> int:
        return len(ENTRIES)
