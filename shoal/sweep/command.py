"""A shoal command as a sweep uses it: its options, and how values become words of a command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from shoal.errors import ShoalError

OWN = ("out", "resume", "json", "max_seconds")
"""Options that the sweep sets itself."""


@dataclass(frozen=True)
class Option:
    """How an option is written: `on VALUE`; for a flag, `on` if true and `off` if false (None: leave it out)."""

    on: str
    off: str | None = None
    flag: bool = False
    repeats: bool = False


@dataclass(frozen=True)
class Command:
    """A command that a sweep may run. `check` raises ShoalError for words (without the name) that it would refuse."""

    name: str
    arguments: tuple[str, ...]
    options: Mapping[str, Option]
    check: Callable[[Sequence[str]], None]

    @property
    def settable(self) -> tuple[str, ...]:
        """Names of all arguments and options that a grid file may set."""
        return tuple(name for name in (*self.arguments, *self.options) if name not in OWN)

    def unknown(self, name: str) -> str:
        """The middle of an error message about `name`, which is not settable."""
        if name in OWN:
            return f"option {name!r}, which the sweep sets itself; need other options; remove it"
        near = get_close_matches(name, self.settable, 1, 0.0)
        return f"no option {name!r} of {self.name}; need {near[0]!r}, the nearest, or one of {', '.join(self.settable)}"

    def words(self, values: Mapping[str, Any], out: str, where: str) -> tuple[str, ...]:
        """The command line after `shoal`, options before arguments; a value of None leaves an option out.

        Raises ShoalError, naming the stage `where`, for a missing argument or a value that cannot be written as a word.
        """
        words, arguments = [self.name, "--out", out], []
        for name in self.arguments:
            if values.get(name) is None:
                raise ShoalError(f"found no {name!r} at {where}; need it for shoal {self.name}; add it")
            arguments.append(_word(name, values[name], where))
        for name, value in values.items():
            if name in self.options and value is not None:
                words += self._option(name, value, where)
        return (*words, "--", *arguments)

    def _option(self, name: str, value: Any, where: str) -> list[str]:
        option = self.options[name]
        if option.flag:
            if not isinstance(value, bool):
                raise ShoalError(f"found {name}: {value!r} at {where}; need true or false; choose one")
            return [option.on] if value else [option.off] if option.off else []
        parts = value if option.repeats and isinstance(value, list) else [value]
        return [word for part in parts for word in (option.on, _word(name, part, where))]


def text(value: Any) -> str:
    """A value of a grid file as it is written on the command line."""
    if isinstance(value, list):
        return ",".join(text(part) for part in value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _word(name: str, value: Any, where: str) -> str:
    if isinstance(value, (list, dict)) or value is None:
        raise ShoalError(f"found {name}: {value!r} at {where}; need one value; put lists under `grid`")
    return text(value)
