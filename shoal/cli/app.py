"""The command line: the list of commands, the options of all of them, and the handling of errors."""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from shoal import __version__
from shoal.cli.commands import GROUPS, HELP_NAMES, Commands, with_verbosity
from shoal.errors import ShoalError, ShoalWarning, StoppedError
from shoal.progress import verbosity

HELP = """Make trained PyTorch CNNs cheap enough to run privately.

shoal removes most of the ReLUs and some of the layers of a trained network, retrains it by distillation, and runs it
as a two-party computation: the client never reveals its image, and the server never reveals its weights.
"""

TOUR = """First steps (shoal COMMAND --help explains each command):

  shoal demo                                   the whole pipeline, 6 min
  shoal check mynets:MyCNN --input 3x32x32     can your network run in private?

Train and reduce:

  shoal train resnet18 --data cifar100 --data-dir DATA --out runs/teacher
  shoal reduce runs/teacher --budget 49600 --out runs/reduced
  shoal report runs/reduced

Run in private, with serve on one machine, prepare and query on another:

  shoal compile runs/reduced --out artifact
  shoal certs certs
  shoal serve artifact/server --cert certs/server.pem --key certs/server.key \\
      --ca certs/ca.pem
  shoal prepare artifact/client --count 10 --cert certs/client.pem \\
      --key certs/client.key --ca certs/ca.pem
  shoal query artifact/client IMAGE.png --cert certs/client.pem \\
      --key certs/client.key --ca certs/ca.pem

Exit status: 0 done; 1 an error, or `check` found layers that cannot run in
private; 2 wrong usage; 75 stopped at a checkpoint, --resume continues.
"""


class Group(typer.core.TyperGroup):
    """The group of all commands. Its help lists them by subject, and ends with a tour that is not wrapped."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"commands": {}})
        self.commands = Commands()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group of commands."""
        for title, entries in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.line) for name, entry in entries.items()])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the tour."""
        formatter.write("\n" + TOUR)


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=HELP_NAMES,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"shoal {__version__}\n")
        raise typer.Exit


@app.callback(help=HELP)
@with_verbosity
def shoal(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """The options that are given before a command."""


def main() -> None:
    """Run the command line.

    A ShoalError is printed as one sentence on standard error, and the exit status is 1 (75 for a stop at a checkpoint).
    With ``--json``, ``{"error": sentence, "status": number}`` is also printed on standard output. A ShoalWarning is
    printed as one sentence.
    """
    warnings.showwarning = _show_warning
    verbosity.set(0)
    try:
        app(standalone_mode=True)
    except ShoalError as error:
        if verbosity.get() > 1:
            traceback.print_exc()
        _say(str(error))
        first = os.environ.get("RANK", "0") == "0"  # under torchrun the other processes only name their error
        if isinstance(error, StoppedError) and first:
            _say(f"to continue: {continuation(sys.argv[1:])}")
        if "--json" in sys.argv and first:
            sys.stdout.write(json.dumps({"error": str(error), "status": error.status}) + "\n")
        sys.exit(error.status)


def continuation(words: Sequence[str]) -> str:
    """The command line that resumes the command with these words; after ``--`` all words are arguments."""
    end = words.index("--") if "--" in words else len(words)
    more = [] if "--resume" in words[:end] else ["--resume"]
    return shlex.join(["shoal", *words[:end], *more, *words[end:]])


def _show_warning(
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
