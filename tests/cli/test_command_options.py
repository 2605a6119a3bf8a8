"""Options that come from the fields of dataclasses: spelling, default, help, and what a command gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.cli.commands import ENTRIES
from shoal.cli.fields import expanded, options_of
from shoal.cli.sweep import commands
from shoal.errors import ShoalError
from shoal.jobs.options import Shared
from shoal.recipes import inplace, self_distill, shallow

KINDS = {"fast": "at once", "slow": "later"}


@dataclass(frozen=True)
class Base:
    """What other choices build on."""

    place: Path = field(metadata={"cli": "argument"})
    """Where it is."""
    kind: str = field(default="fast", metadata={"values": KINDS})
    """How soon."""


@dataclass(frozen=True)
class Choices(Base):
    """Choices of every form."""

    parts: tuple[float, ...] = (0.5, 1.0)
    """Fractions."""
    names: tuple[str, ...] = field(default=(), metadata={"cli": "--name"})
    """A name."""
    checked: bool = True
    """Whether it is checked."""
    secret: int = field(default=7, metadata={"cli": None})
    """No option."""


seen: list[Choices] = []


@expanded
def command(choices: Choices, loud: bool = False) -> None:
    """A command."""
    seen.append(choices)


@pytest.fixture
def run() -> Any:
    made = typer.Typer(add_completion=False, rich_markup_mode=None)
    made.command()(command)
    seen.clear()

    def called(*words: str) -> str:
        done = CliRunner().invoke(made, list(words))
        if isinstance(done.exception, ShoalError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    return called


def test_a_command_gets_the_dataclass(run: Any) -> None:
    run("here")
    run("here", "--parts", "0.25,1", "--name", "a", "--name", "b", "--no-checked", "--kind", "slow")
    assert seen == [Choices(Path("here")), Choices(Path("here"), "slow", (0.25, 1.0), ("a", "b"), checked=False)]


def test_help_has_the_strings_below_the_fields(run: Any) -> None:
    text = " ".join(run("--help").split())
    assert "How soon. fast: at once; slow: later." in text
    assert "0.5,1" in text
    assert "--no-checked" in text
    assert "secret" not in text


def test_fields_that_are_given_by_keyword_come_last(run: Any) -> None:
    @dataclass(frozen=True, kw_only=True)
    class First:
        """Base."""

        late: int = 1

    @dataclass(frozen=True)
    class Second(First):
        """Its own field comes first in `__init__`, too."""

        early: int = 2

    assert [field.name for field, _, _ in options_of(Second)] == ["early", "late"]


def test_numbers_are_refused_by_the_option_that_was_typed(run: Any) -> None:
    with pytest.raises(ShoalError, match="found --parts 'half'; need numbers"):
        run("here", "--parts", "half")


@pytest.mark.parametrize("name", ENTRIES)
def test_every_option_of_a_command_has_a_help_text(name: str) -> None:
    made = typer.main.get_command(app).commands[name]
    assert [p.name for p in made.params if not getattr(p, "help", None)] == []


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("train", [Shared]),
        ("reduce", [Shared, shallow.Choices]),
        ("self-distill", [Shared, self_distill.Options]),
        ("inplace", [Shared, inplace.Options]),
        ("distill", [Shared]),
        ("prune", [Shared]),
    ],
)
def test_a_grid_file_names_options_as_they_are_typed(name: str, kinds: list[type]) -> None:
    found = commands(typer.main.get_command(app))[name]
    for kind in kinds:
        for own in kind.__dataclass_fields__.values():  # type: ignore[attr-defined]
            spelt = own.metadata.get("cli", "--" + own.name.replace("_", "-"))
            if spelt is not None:
                assert found.options[spelt.lstrip("-").replace("-", "_")].on.lstrip("-").startswith(spelt.lstrip("-"))
