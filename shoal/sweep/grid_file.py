"""A grid file as it is written: stages, each with a command, fixed options and axes."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shoal.errors import ShoalError
from shoal.sweep.command import Command


@dataclass(frozen=True)
class Stage:
    """A stage: the options that all its runs share, and the axes along which they differ."""

    name: str
    command: Command
    fixed: dict[str, Any]
    axes: dict[str, list[Any]]

    @property
    def where(self) -> str:
        """The stage's name in error messages."""
        return f"stage {self.name!r}"

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Every combination of values on the axes; the last axis changes fastest."""
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))


class Loader(yaml.SafeLoader):
    """A YAML loader that raises ShoalError for a key that is given twice, instead of using the last value."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        twice = [key for key, n in Counter(str(k.value) for k, _ in node.value).items() if n > 1]
        if twice:
            raise ShoalError(f"found {twice[0]!r} twice{node.start_mark}; need one of them; make a list of its values")
        return super().construct_mapping(node, deep)


def read_stages(path: Path, commands: Mapping[str, Command]) -> list[Stage]:
    """The stages of a grid file.

    Raises ShoalError when the file is not a grid, commands or options are unknown, or axes are empty.
    """
    stages = [_stage(body, commands) for body in _bodies(path)]
    refuse_twice([stage.name for stage in stages], "stage", "give one of them another name")
    return stages


def _bodies(path: Path) -> list[dict[str, Any]]:
    """The stages as they are written: the list below `stages`, or the whole file as the only stage."""
    try:
        body = yaml.load(path.read_text(), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ShoalError(f"found no grid at {path} ({error}); need a YAML file; see docs/sweeps.md") from error
    stages = body.get("stages", [body]) if isinstance(body, dict) else None
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ShoalError(f"found no stages in {path}; need `command`, options and `grid`, or a list of such `stages`")
    beside = [key for key in body if "stages" in body and key != "stages"]
    if beside:
        raise ShoalError(f"found {beside[0]!r} beside `stages` in {path}; need it within a stage; move it")
    return stages


def _stage(body: dict[str, Any], commands: Mapping[str, Command]) -> Stage:
    command = commands.get(str(body.get("command")))
    if command is None:
        raise ShoalError(f"found command {body.get('command')!r} in a stage; need one of {', '.join(commands)}")
    name, axes = str(body.get("name", command.name)), body.get("grid", {})
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ShoalError(f"found stage name {name!r}; need letters, digits, '.', '_' and '-'; choose another")
    if not isinstance(axes, dict):
        raise ShoalError(f"found {axes!r} as `grid` of stage {name!r}; need lists of values by option; write them so")
    fixed = {k: v for k, v in body.items() if k not in ("name", "command", "grid")}
    stage = Stage(name, command, by_name(fixed), by_name(axes))
    check_options(stage)
    return stage


def by_name(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Options in Python's spelling: data-dir becomes data_dir. Raises ShoalError when two become one."""
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    if len(named) < len(values):
        raise ShoalError(f"found an option twice, with - and with _, in {', '.join(map(str, values))}; need it once")
    return named


def check_options(stage: Stage) -> None:
    """Raise ShoalError for an unknown fixed option, one that is also an axis, and an axis without a list of values."""
    for key in stage.fixed:
        if key not in stage.command.settable:
            raise ShoalError(f"found {stage.command.unknown(key)} at {stage.where}")
        if key in stage.axes:
            raise ShoalError(f"found {key!r} fixed and in the grid of {stage.where}; need one; remove the other")
    for key, values in stage.axes.items():
        if not isinstance(values, list) or not values:
            raise ShoalError(f"found {values!r} as axis {key!r} of {stage.where}; need a list of values; fill it")


def refuse_twice(names: Sequence[str], what: str, do: str) -> None:
    """Raise ShoalError when a name of a `what` occurs twice."""
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ShoalError(f"found {what} {twice[0]!r} twice; need a folder for each; {do}")
