"""Reuse of the masks of an earlier reduction for one that differs only in fine-tuning.

Reductions with and without gated branches, or with different classifiers, have the same stages 1 and 2, which take two
thirds of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.errors import ShoalError
from shoal.storage.origins import fingerprints
from shoal.storage.run import Run

STAGES = ("sensitivity", "mask")
SETTINGS = ("seed", "limit", "preset", "precision")
OPTIONS = ("budget", "masks", "granularity", "density", "sensitivity")
"""Settings of a run and options of a reduction that decide its masks. Epochs, teacher and data do so, too."""


def check_masks(config: Mapping[str, Any], earlier: Run, epochs: int) -> None:
    """Raise ShoalError unless `earlier` has finished the mask search of `config`, with `epochs` epochs."""
    odd = difference(config, earlier.config())
    if odd:
        raise ShoalError(
            f"found another {odd} in the run at {earlier.folder}; need masks of the same teacher, data and search; "
            "name the reduction that has them, or leave --masks-from out"
        )
    found = earlier.checkpoint("mask")
    done = found.read_last().progress["epoch"] + 1 if found.has_last else 0
    if done < epochs:
        raise ShoalError(
            f"found {done} of {epochs} epochs of the search of masks at {earlier.folder}; need all; resume that run"
        )


def take_masks(run: Run, earlier: Run) -> None:
    """Copy the results and checkpoints of stages 1 and 2 of `earlier` into `run`, which then continues with stage 3."""
    if earlier.has("sensitivity.json"):
        run.write_json("sensitivity.json", earlier.read_json("sensitivity.json"))
    for stage in STAGES:
        run.checkpoint(stage).take(earlier.checkpoint(stage))


def has_masks(run: Run) -> bool:
    """Whether `run` has masks already. They are copied last, so it then has everything from the earlier run."""
    return run.checkpoint(STAGES[-1]).has_last


def difference(own: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first setting that differs between two reductions and decides their masks; None if there is no such one."""
    a, b = (_decisive(config) for config in (own, other))
    return next((name for name in a if a[name] != b[name]), None)


def _decisive(config: Mapping[str, Any]) -> dict[str, object]:
    options = config.get("options") or {}
    found = {name: config.get(name) for name in SETTINGS} | {name: options.get(name) for name in OPTIONS}
    # The third number, for fine-tuning, does not affect the masks.
    found["epochs"] = str(config.get("epochs") or "").split(",")[:2]
    return found | {name: fingerprints(config).get(name) for name in ("teacher", "data")}
