"""Masks that an earlier reduction found, for one that differs from it in fine-tuning alone.

With and without gated branches, with this or that classifier: stages 1 and 2 are the same, and two thirds of the time.
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
"""Settings of a run, and options of a reduction, that decide which masks are found; beside them epochs and teacher."""


def check_masks(config: Mapping[str, Any], earlier: Run, epochs: int) -> None:
    """Raise ShoalError unless the run `earlier` has searched, for `epochs`, as a run of this configuration would."""
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
    """Copy stages 1 and 2 of `earlier` into `run`, which goes on from there."""
    if earlier.has("sensitivity.json"):
        run.write_json("sensitivity.json", earlier.read_json("sensitivity.json"))
    for stage in STAGES:
        run.checkpoint(stage).take(earlier.checkpoint(stage))


def has_masks(run: Run) -> bool:
    """Whether `run` has masks already, so that it needs no other run's: they are what is copied last."""
    return run.checkpoint(STAGES[-1]).has_last


def difference(own: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first setting that decides which masks are found and differs between two reductions' configurations."""
    a, b = (_decisive(config) for config in (own, other))
    return next((name for name in a if a[name] != b[name]), None)


def _decisive(config: Mapping[str, Any]) -> dict[str, object]:
    options = config.get("options") or {}
    found = {name: config.get(name) for name in SETTINGS} | {name: options.get(name) for name in OPTIONS}
    # Fine-tuning's number, the third, decides no mask.
    found["epochs"] = str(config.get("epochs") or "").split(",")[:2]
    return found | {name: fingerprints(config).get(name) for name in ("teacher", "data")}
