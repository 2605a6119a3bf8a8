"""Commands whose options are the fields of dataclasses: names, defaults, kinds, help, and what is left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from shoal.cli.fields import docs_of, expanded
from shoal.errors import ShoalError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Something that both drinks need."""

    water_l: float = field(default=1.5, metadata={"cli": "--water"})
    """Litres of water
    in the tank."""
    serial: int = field(default=7, metadata={"cli": None})
    """Not for users."""


@dataclass(frozen=True, kw_only=True)
class Coffee(Machine):
    """A drink, made by a machine."""

    beans: tuple[Path, ...] = field(metadata={"cli": "argument"})
    """Files of beans."""
    cup_size: int = 2
    """Size of the cup."""
    sugar: bool = False
    """Add sugar."""
    milk: bool = True
    """Add milk."""
    note: str | None = None
    """A note for the cup."""
    heats: tuple[float, ...] = (90.0, 95.0)
    """Degrees, step by step."""
    friends: tuple[str, ...] = ()
    """Who else gets one."""
    rooms: tuple[str, ...] | None = None
    """Rooms to serve in."""
    extras: list[str] = field(default_factory=list)
    """More of everything."""


@dataclass(frozen=True)
class Tip:
    """What is paid on top."""

    cents: int
    """Cents on top."""


def run(command: Any, *words: str) -> tuple[int, str]:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(command)
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def brew(*words: str) -> Coffee:
    """What a command gets for these words."""
    got: list[Coffee] = []

    @expanded
    def command(coffee: Coffee) -> None:
        got.append(coffee)

    code, output = run(command, *words)
    assert code == 0, output
    return got[0]


def test_without_options_a_command_gets_the_defaults() -> None:
    assert brew("a.txt") == Coffee(beans=(Path("a.txt"),))


def test_every_kind_of_field_is_read() -> None:
    words = ["--water", "0.5", "--cup-size", "3", "--sugar", "--no-milk", "--note", "hot", "--heats", "80,85.5"]
    words += ["--friends", "ann", "--friends", "bob", "--rooms", "kitchen", "--extras", "foam", "a.txt", "b.txt"]
    assert brew(*words) == Coffee(
        beans=(Path("a.txt"), Path("b.txt")),
        water_l=0.5,
        cup_size=3,
        sugar=True,
        milk=False,
        note="hot",
        heats=(80.0, 85.5),
        friends=("ann", "bob"),
        rooms=("kitchen",),
        extras=["foam"],
    )


@pytest.mark.parametrize("words", [["--serial", "3"], ["--water-l", "1"], ["--no-sugar"], ["--beans", "c.txt"]])
def test_there_are_no_options_but_these(words: list[str]) -> None:
    with pytest.raises(AssertionError, match="No such option"):
        brew(*words, "a.txt")


def test_required_values_are_asked_for() -> None:
    with pytest.raises(AssertionError, match="Missing argument"):
        brew()

    @expanded
    def command(tip: Tip) -> None:
        raise AssertionError("it ran without its option")

    code, output = run(command)
    assert code == 2
    assert "--cents" in output


def test_help_is_the_text_below_the_field_on_one_line_bases_included() -> None:
    docs = docs_of(Coffee)
    assert docs["water_l"] == "Litres of water in the tank."
    assert docs["rooms"] == "Rooms to serve in."

    @expanded
    def command(coffee: Coffee) -> None:
        """Make a drink."""

    _, output = run(command, "--help")
    shown = " ".join(output.split())
    assert "Make a drink." in shown
    assert "Not for users." not in shown
    for name, text in docs.items():
        assert (text in shown) == (name != "serial"), name
    assert "[default: 1.5]" in shown
    assert "[default: 90,95]" in shown


def test_own_parameters_and_several_dataclasses_go_together() -> None:
    got: list[Any] = []

    @expanded
    def command(name: str, coffee: Coffee, tip: Tip, loud: bool = False) -> None:
        got.append((name, coffee.cup_size, tip, loud))

    assert run(command, "ann", "a.txt", "--cents", "30", "--loud", "--cup-size", "1")[0] == 0
    assert got == [("ann", 1, Tip(30), True)]


def test_two_dataclasses_may_not_share_an_option() -> None:
    with pytest.raises(ValueError, match="duplicate parameter name"):

        @expanded
        def command(coffee: Coffee, machine: Machine) -> None:
            """Has --water twice."""


def test_text_that_is_no_list_of_numbers_gets_one_sentence() -> None:
    with pytest.raises(ShoalError, match=r"found --heats '80;90'; need numbers separated by commas"):
        brew("--heats", "80;90", "a.txt")
