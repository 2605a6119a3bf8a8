"""Values that the command line sets instead of the grid file: `[STAGE.]OPTION=VALUE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import yaml

from shoal.errors import ShoalError, first_line
from shoal.sweep.command import OWN
from shoal.sweep.grid_file import Loader, Stage, check_options


@dataclass(frozen=True)
class Override:
    """A value of an option or axis, for one stage or for every stage that has it; `text` is how it was written."""

    stage: str | None
    option: str
    value: Any
    text: str

    def fits(self, stage: Stage) -> bool:
        """Whether the stage can take it: its command has the option, or its grid has the axis."""
        known = self.option in stage.command.settable or self.option in stage.axes
        return known and self.stage in (None, stage.name)


def read_override(text: str) -> Override:
    """Parse `[STAGE.]OPTION=VALUE`, where VALUE is YAML. Raises ShoalError for anything else."""
    key, equals, written = text.partition("=")
    stage, dot, option = key.strip().rpartition(".")  # stage names may contain dots, options do not
    if not (equals and option and written.strip()) or (dot and not stage):
        raise ShoalError(f"found --set {text!r}; need [STAGE.]OPTION=VALUE, null for no value; write it so")
    try:
        value = yaml.load(written, Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        reason = first_line(error)
        raise ShoalError(f"found --set {text!r} ({reason}); need YAML after '='; write a value or [a, list]") from error
    if isinstance(value, dict):
        raise ShoalError(f"found --set {text!r}; need a value or a list; quote references: {option}='\"{{axis}}\"'")
    return Override(stage or None, option.replace("-", "_"), value, text)


def override(stages: Sequence[Stage], texts: Sequence[str]) -> list[Stage]:
    """The stages with all overrides. One for a named stage wins over one for all stages, in any order.

    Raises ShoalError for an override that cannot be parsed, fits no stage, or is given twice.
    """
    overrides = sorted(map(read_override, texts), key=lambda one: one.stage is not None)
    for i, one in enumerate(overrides):
        _check(one, stages)
        if any((one.stage, one.option) == (other.stage, other.option) for other in overrides[:i]):
            raise ShoalError(
                f"found --set {one.text!r} after another one for the same option; need one; remove the other"
            )
    return [_with(stage, overrides) for stage in stages]


def _check(one: Override, stages: Sequence[Stage]) -> None:
    """Raise ShoalError for an override that fits no stage."""
    named = [stage for stage in stages if one.stage in (None, stage.name)]
    if not named:
        names = ", ".join(stage.name for stage in stages)
        raise ShoalError(
            f"found stage {one.stage!r} in --set {one.text!r}; need one of the file's: {names}; choose one"
        )
    if any(one.fits(stage) for stage in stages):
        return
    if one.option in OWN or len(named) == 1:
        raise ShoalError(f"found {named[0].command.unknown(one.option)} (--set {one.text!r})")
    known = dict.fromkeys(name for stage in stages for name in (*stage.axes, *stage.command.settable))
    near = get_close_matches(one.option, known, 1, 0.0)[0]
    raise ShoalError(f"found no stage with an option {one.option!r} for --set {one.text!r}; need {near!r}, the nearest")


def _with(stage: Stage, overrides: Sequence[Override]) -> Stage:
    for one in overrides:
        if one.fits(stage):
            stage = _put(stage, one.option, one.value)
    check_options(stage)
    return stage


def _put(stage: Stage, option: str, value: Any) -> Stage:
    """The stage with another value of an option.

    An axis stays an axis, so that names and references remain valid. A list for an option with a single value becomes
    an axis.
    """
    known = stage.command.options.get(option)
    spread = isinstance(value, list) and not (known is not None and known.repeats)
    if option in stage.axes or spread:
        values = value if isinstance(value, list) else [value]
        fixed = {key: kept for key, kept in stage.fixed.items() if key != option}
        return replace(stage, fixed=fixed, axes=stage.axes | {option: values})
    return replace(stage, fixed=stage.fixed | {option: value})
