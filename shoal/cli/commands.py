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
    """The module and function of a command, and its line in the list of commands."""

    module: str
    function: str
    line: str


GROUPS: dict[str, dict[str, Entry]] = {
    "Inspect": {
        "demo": Entry("demo", "demo", "Train, reduce and privately run a network on digits."),
        "count": Entry("inspect", "count", "Count a network's ReLUs, MACs, conv depth and parameters."),
        "check": Entry("inspect", "check", "Show a network's costs, and what cannot run in private."),
        "evaluate": Entry("inspect", "evaluate", "Show test accuracy, ReLUs and MACs of a run's network."),
        "report": Entry("report", "report", "Compare runs in a table, a page, a CSV file or a plot."),
        "analyse": Entry("analyse", "analyse", "Study a network's exits, features and gradients."),
    },
    "Train and reduce": {
        "adopt": Entry("adopt", "adopt", "Make a run of a network that is trained already."),
        "train": Entry("train", "train", "Train a network with all of its ReLUs."),
        "reduce": Entry("reduce", "reduce", "Reduce a trained network to a ReLU budget."),
        "self-distill": Entry("self_distill", "self_distill", "Train a network whose deeper exits teach the others."),
        "inplace": Entry("inplace", "inplace", "Train all exits or widths of a network at once."),
        "anytime": Entry("inplace", "anytime", "Show accuracy and cost of every exit or width."),
        "distill": Entry("distill", "distill", "Distill from a teacher, other networks or similar samples."),
        "exits": Entry("exits", "exits", "Find thresholds for early exit, and what it saves."),
        "export": Entry("exits", "export", "Write a network with exits as ONNX files, one per stage."),
        "prune": Entry("prune", "prune", "Prune weights, filters or channels, and train again."),
        "sweep": Entry("sweep", "sweep", "Run a grid of these commands; show mean and spread."),
    },
    "Deploy and serve": {
        "compile": Entry("query", "compile_", "Compile a run's network for private inference."),
        "certs": Entry("query", "certs", "Make test certificates for mutual TLS."),
        "serve": Entry("serve", "serve", "Run the server, which holds the weights."),
        "prepare": Entry("query", "prepare", "Make random data with the server, before queries."),
        "pool": Entry("query", "pool", "Show how many prepared items are left."),
        "query": Entry("query", "query", "Classify images privately, as the server's client."),
    },
    "Measure and plan": {
        "plan": Entry("plan", "plan", "Find networks that meet a limit in seconds, bytes or ReLUs."),
        "cost": Entry("costs", "cost", "Forecast a private inference before compiling."),
        "calibrate": Entry("costs", "calibrate", "Measure the speed of this machine for forecasts."),
        "bench": Entry("costs", "bench", "Time prepared queries over a simulated LAN or WAN."),
    },
}
"""The commands, in the groups and the order in which `shoal --help` lists them."""

HELP_NAMES = {"help_option_names": ["-h", "--help"]}


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors, no progress or notes.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Show the log; -vv also shows the traceback of an error.")
]


def with_verbosity(command: Callable[..., None]) -> Callable[..., None]:
    """`command` for typer, with the additional options --quiet and --verbose."""

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
