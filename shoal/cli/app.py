"""The command line. Thin: each command calls one part of the library and prints a table or JSON."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any, TextIO

import typer
from rich.console import Console

from shoal.errors import ShoalError, ShoalWarning

HELP = """Make a trained CNN shallow and ReLU-light, then run it privately between two parties.

A first tour (each command explains itself with --help):

  shoal demo --out runs/demo                      everything below, on embedded data

  shoal count resnet18 --input 3x32x32 --classes 100

  shoal check mypackage.nets:MyCNN --input 3x32x32    what cannot run in private, and what to do instead

  shoal train resnet18 --data cifar100 --data-dir DATA --out runs/teacher

  shoal reduce runs/teacher --budget 49600 --preset paper --out runs/reduced

  shoal self-distill resnet18 --data cifar100 --data-dir DATA --out runs/exits    several classifiers in one network
  shoal inplace msdnet-7 --data cifar100 --data-dir DATA --out runs/msdnet     all of its exits at once, or --widths
  shoal distill osakd resnet18 --data cifar100 --data-dir DATA --out runs/osakd     or by a teacher, or by peers

  shoal exits runs/exits                                      let images leave early that an exit is sure of

  shoal plan runs/teacher --target 0.5s --network lan --out plan.json     or a target in seconds, before training

  shoal sweep GRID.yaml --out runs/sweep          many of both: grids and seeds, some at once

  shoal compile runs/reduced --out artifact; shoal certs certs

  shoal serve artifact/server --cert certs/server.pem --key certs/server.key --ca certs/ca.pem

  shoal prepare artifact/client --count 10 --cert certs/client.pem --key certs/client.key --ca certs/ca.pem

  shoal query artifact/client IMAGE.png --cert certs/client.pem --key certs/client.key --ca certs/ca.pem
"""


@dataclass(frozen=True)
class Entry:
    """Where a command is, and its line in the list of commands."""

    module: str
    function: str
    line: str


GROUPS: dict[str, dict[str, Entry]] = {
    "Inspect": {
        "demo": Entry("demo", "demo", "Train, reduce and privately run a network on scikit-learn's digits."),
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

ENTRIES = {name: entry for group in GROUPS.values() for name, entry in group.items()}


class Commands(MutableMapping[str, Any]):
    """The commands by name. Each is imported when it is looked up, so that help and other commands start quickly."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.made:
            entry = ENTRIES[name]
            one = typer.Typer(add_completion=False, rich_markup_mode=None)
            one.command(name)(getattr(importlib.import_module(f"shoal.cli.{entry.module}"), entry.function))
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


class Group(typer.core.TyperGroup):
    """The group of all commands, listed by subject."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"commands": {}})
        self.commands = Commands()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group of commands."""
        for title, entries in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.line) for name, entry in entries.items()])


app = typer.Typer(cls=Group, help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback(help=HELP)
def shoal() -> None:
    """Options that stand before a command; the help is that of `app`."""


def main() -> None:
    """Run the command line; a ShoalError is one clear sentence on standard error and status 1, or 75 for a stop.

    So is a ShoalWarning, which ends nothing.
    """
    warnings.showwarning = _shown
    try:
        app(standalone_mode=True)
    except ShoalError as error:
        _say(str(error))
        sys.exit(error.status)


def _shown(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = f"{filename}:{lineno}: {category.__name__}: {message}"
    _say(str(message) if issubclass(category, ShoalWarning) else text)


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"shoal: {text}", markup=False, highlight=False)
