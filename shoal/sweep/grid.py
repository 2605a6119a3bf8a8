"""A grid file: the runs of shoal's commands that a sweep makes, their folders, and which has to wait for which."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shoal.errors import ShoalError
from shoal.sweep.command import Command, text

LONGEST_NAME = 200
"""Characters of a run's name; file systems end at 255, and logs and results add theirs."""
_REFERENCE = re.compile(r"\{([\w.-]+)\}")


@dataclass(frozen=True)
class Planned:
    """One run: its name, its place in the grid, the command line after `shoal`, and the names of the runs it needs."""

    name: str
    stage: str
    axes: Mapping[str, Any]
    words: tuple[str, ...]
    needs: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class _Stage:
    """A stage of the file: what all its runs have, and the axes along which they differ."""

    name: str
    command: Command
    fixed: dict[str, Any]
    axes: dict[str, list[Any]]

    @property
    def where(self) -> str:
        """For error messages."""
        return f"stage {self.name!r}"

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Each cell of the grid; the last axis changes fastest."""
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, and not the end of the first one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        twice = [key for key, n in Counter(str(k.value) for k, _ in node.value).items() if n > 1]
        if twice:
            raise ShoalError(f"found {twice[0]!r} twice{node.start_mark}; need one of them; make a list of its values")
        return super().construct_mapping(node, deep)


def read_grid(path: Path, commands: Mapping[str, Command], folder: Path) -> tuple[Planned, ...]:
    """The runs of a grid file, in an order in which each comes after those it needs; folders below `folder`.

    Raises ShoalError for a file that is none, and for what would let a run fail before its work begins: unknown
    commands, options and references, values that an option refuses, empty axes, two runs with one folder.
    """
    stages = [_stage(body, commands) for body in _bodies(path)]
    _refuse_twice([stage.name for stage in stages], "stage", "give one of them another name")
    runs: list[Planned] = []
    for stage in stages:
        _check_axes(stage, runs)
        runs += [_plan(stage, axes, tuple(runs), folder) for axes in stage.combinations()]
    _refuse_twice([run.name for run in runs], "run", "remove equal values, or give the stages other names")
    for run in runs:
        commands[run.words[0]].check(run.words[1:])
    return tuple(runs)


def _bodies(path: Path) -> list[dict[str, Any]]:
    """The stages as they are written: a list below `stages`, or the whole file as the only one."""
    try:
        body = yaml.load(path.read_text(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ShoalError(f"found no grid at {path} ({error}); need a YAML file; see docs/sweeps.md") from error
    stages = body.get("stages", [body]) if isinstance(body, dict) else None
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ShoalError(f"found no stages in {path}; need `command`, options and `grid`, or a list of such `stages`")
    beside = [key for key in body if "stages" in body and key != "stages"]
    if beside:
        raise ShoalError(f"found {beside[0]!r} beside `stages` in {path}; need it within a stage; move it")
    return stages


def _stage(body: dict[str, Any], commands: Mapping[str, Command]) -> _Stage:
    command = commands.get(str(body.get("command")))
    if command is None:
        raise ShoalError(f"found command {body.get('command')!r} in a stage; need one of {', '.join(commands)}")
    name, axes = str(body.get("name", command.name)), body.get("grid", {})
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ShoalError(f"found stage name {name!r}; need letters, digits, '.', '_' and '-'; choose another")
    if not isinstance(axes, dict):
        raise ShoalError(f"found {axes!r} as `grid` of stage {name!r}; need lists of values by option; write them so")
    fixed = {k: v for k, v in body.items() if k not in ("name", "command", "grid")}
    stage = _Stage(name, command, _by_name(fixed), _by_name(axes))
    _check_options(stage)
    return stage


def _by_name(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Options as Python spells them: data-dir is data_dir."""
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    if len(named) < len(values):
        raise ShoalError(f"found an option twice, with - and with _, in {', '.join(map(str, values))}; need it once")
    return named


def _check_options(stage: _Stage) -> None:
    """Raise ShoalError for fixed options that the command has not, and for axes that are no lists of values."""
    for key in stage.fixed:
        if key not in stage.command.settable:
            raise ShoalError(f"found {stage.command.unknown(key)} at {stage.where}")
        if key in stage.axes:
            raise ShoalError(f"found {key!r} fixed and in the grid of {stage.where}; need one; remove the other")
    for key, values in stage.axes.items():
        if not isinstance(values, list) or not values:
            raise ShoalError(f"found {values!r} as axis {key!r} of {stage.where}; need a list of values; fill it")


def _check_axes(stage: _Stage, earlier: Sequence[Planned]) -> None:
    """Raise ShoalError for an axis that is neither an option nor used by a reference: its runs would be alike."""
    written = [str(value) for value in (*stage.fixed.values(), *itertools.chain(*stage.axes.values()))]
    used = {name for value in written for name in _REFERENCE.findall(value)}
    used |= {axis for run in earlier if run.stage in used for axis in run.axes}
    for axis in stage.axes:
        if axis not in stage.command.settable and axis not in used:
            raise ShoalError(f"found {stage.command.unknown(axis)} in the grid of {stage.where}")


def _refuse_twice(names: Sequence[str], what: str, do: str) -> None:
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ShoalError(f"found {what} {twice[0]!r} twice; need a folder for each; {do}")


def _plan(stage: _Stage, axes: dict[str, Any], earlier: Sequence[Planned], folder: Path) -> Planned:
    """The run of one cell."""
    needs: dict[str, Planned] = {}

    def meaning(reference: re.Match[str]) -> str:
        name = reference[1]
        if name in axes:
            return text(axes[name])
        needs[name] = _needed(name, stage, axes, earlier)
        return str(needs[name].folder)

    own = {key: value for key, value in axes.items() if key in stage.command.settable}
    values = {key: _filled(value, meaning) for key, value in (stage.fixed | own).items()}
    name = _name(stage.name, axes)
    place = folder / "runs" / name
    words = stage.command.words(values, str(place), stage.where)
    return Planned(name, stage.name, axes, words, tuple(run.name for run in needs.values()), place)


def _filled(value: Any, meaning: Callable[[re.Match[str]], str]) -> Any:
    if isinstance(value, list):
        return [_filled(part, meaning) for part in value]
    return _REFERENCE.sub(meaning, value) if isinstance(value, str) else value


def _needed(name: str, stage: _Stage, axes: Mapping[str, Any], earlier: Sequence[Planned]) -> Planned:
    """The one run of the earlier stage `name` that has the same values on all of that stage's axes."""
    runs = [run for run in earlier if run.stage == name]
    if not runs:
        known = [*axes, *dict.fromkeys(run.stage for run in earlier)]
        raise ShoalError(
            f"found {{{name}}} at {stage.where}; need an axis or an earlier stage; use one of {', '.join(known)}"
        )
    missing = [axis for axis in runs[0].axes if axis not in axes]
    if missing:
        raise ShoalError(
            f"found {{{name}}} at {stage.where}, which has no axis {missing[0]!r}; need it to know which run of "
            f"{name!r} is meant; add it to the grid"
        )
    same = [run for run in runs if all(text(axes[axis]) == text(value) for axis, value in run.axes.items())]
    if not same:
        wanted = ", ".join(f"{axis}={text(axes[axis])}" for axis in runs[0].axes)
        raise ShoalError(f"found no run of stage {name!r} with {wanted}; need it for {stage.where}; add it there")
    return same[0]


def _name(stage: str, axes: Mapping[str, Any]) -> str:
    """The name says the cell, and nothing else in the file changes it."""
    parts = [f"{axis}={re.sub(r'[^A-Za-z0-9_.+,-]+', '-', text(value))}" for axis, value in axes.items()]
    name = "-".join([stage, *parts])
    if len(name) > LONGEST_NAME:
        raise ShoalError(
            f"found a run's name of {len(name)} characters ({name[:40]}...); need {LONGEST_NAME} at most; "
            "shorten the values"
        )
    return name
