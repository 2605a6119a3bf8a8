"""The runs that a grid file describes, their folders, and which runs each one needs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.sweep.command import Command, text
from shoal.sweep.grid_file import Stage, read_stages, refuse_twice
from shoal.sweep.overrides import override

LONGEST_NAME = 200
"""Most characters in a run's name. File systems allow 255, and logs and results add suffixes."""
_REFERENCE = re.compile(r"\{([\w.-]+)\}")


@dataclass(frozen=True)
class Planned:
    """One run: name, stage, values on the axes, command line after `shoal`, names of the runs it needs, and folder."""

    name: str
    stage: str
    axes: Mapping[str, Any]
    words: tuple[str, ...]
    needs: tuple[str, ...]
    folder: Path


def read_grid(
    path: Path, commands: Mapping[str, Command], folder: Path, overrides: Sequence[str] = ()
) -> tuple[Planned, ...]:
    """The runs of a grid file, each after the runs that it needs, with folders below `folder`.

    `overrides` are `[STAGE.]OPTION=VALUE`, and replace values in the file.

    Raises ShoalError when the file is not a grid, or a run would fail before its work begins: unknown commands, options
    and references, values that an option does not accept, empty axes, two runs with one folder. Also for an override
    that fits no stage.
    """
    stages = override(read_stages(path, commands), overrides)
    runs: list[Planned] = []
    for stage in stages:
        _check_axes(stage, runs)
        runs += [_plan(stage, axes, tuple(runs), folder) for axes in stage.combinations()]
    refuse_twice([run.name for run in runs], "run", "remove equal values, or give the stages other names")
    for run in runs:
        commands[run.words[0]].check(run.words[1:])
    return tuple(runs)


def _check_axes(stage: Stage, earlier: Sequence[Planned]) -> None:
    """Raise ShoalError for an axis that is not an option and not used by a reference: its runs would be equal."""
    written = [str(value) for value in (*stage.fixed.values(), *itertools.chain(*stage.axes.values()))]
    used = {name for value in written for name in _REFERENCE.findall(value)}
    used |= {axis for run in earlier if run.stage in used for axis in run.axes}
    for axis in stage.axes:
        if axis not in stage.command.settable and axis not in used:
            raise ShoalError(f"found {stage.command.unknown(axis)} in the grid of {stage.where}")


def _plan(stage: Stage, axes: dict[str, Any], earlier: Sequence[Planned], folder: Path) -> Planned:
    """The run for one combination of values on the axes."""
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


def _needed(name: str, stage: Stage, axes: Mapping[str, Any], earlier: Sequence[Planned]) -> Planned:
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
    """The run's name; it depends only on the stage and the values on the axes."""
    parts = [f"{axis}={re.sub(r'[^A-Za-z0-9_.+,-]+', '-', text(value))}" for axis, value in axes.items()]
    name = "-".join([stage, *parts])
    if len(name) > LONGEST_NAME:
        raise ShoalError(
            f"found a run's name of {len(name)} characters ({name[:40]}...); need {LONGEST_NAME} at most; "
            "shorten the values"
        )
    return name
