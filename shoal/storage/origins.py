"""The paths of a run's data and networks, which may change when it is resumed, and their contents, which may not.

A run's configuration has paths (`PLACES`), for information, and under `FINGERPRINTS` a SHA-256 of what was found at
each. When a run is resumed, the fingerprints are compared and not the paths.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from shoal.data.dataset import CLOUDS, NAMES, Dataset
from shoal.errors import ShoalError
from shoal.storage.files import read_json
from shoal.storage.tensors import checksum

Config = dict[str, Any]
"""Content of `config.json`: the settings that decide a run's result, and the paths of its data and networks.

Each job has its own settings; all have `data`, `data_dir`, `limit` and `seed`.
"""

FINGERPRINTS = "fingerprints"
"""Setting that holds the fingerprints, by the names in `PLACES`."""

PLACES = {
    "data": "data_dir",
    "teacher": "teacher",
    "taught_by": "taught_by",
    "source": "source",
    "plan": "plan",
    "masks": "masks_from",
}
"""Each input of a run, and the setting with its path. Masks have no fingerprint: a run keeps its own copy."""

SIZING = ("size", "fit", "channels")
"""Settings of how image files become images. A run has only those that were given."""
IMAGES = ("mean", "std", *SIZING)
"""The same, and the normalisation of the images, if it is not that of the data set."""
CACHE = "cache"
"""Setting with the folder for decoded images (`shoal.load`), if one was given. It affects no result."""

_FOLDER = "folder"
_ADVICE = {
    "data": ("other data", "give --data-dir the folder that holds them"),
    "plan": ("another plan", "give the file that the run began with"),
}
_NETWORK = ("another network", "give the run that holds the one from before")


def placed(config: Mapping[str, Any], data_dir: Path | None) -> Config:
    """The configuration with `data_dir`; None changes nothing. If `data` was a path, it becomes `folder`."""
    if data_dir is None:
        return dict(config)
    moved = config.get("data_dir") is None and not _is_known(config["data"])
    return {**config, "data_dir": data_dir} | ({"data": _FOLDER} if moved else {})


def inherited(origin: Mapping[str, Any]) -> Config:
    """The settings and the fingerprint of the data in `origin`, for the configuration of a run that starts from it."""
    own: Config = {name: origin[name] for name in (*IMAGES, CACHE) if name in origin}
    if "data" in fingerprints(origin):
        own[FINGERPRINTS] = {"data": fingerprints(origin)["data"]}
    return {name: origin.get(name) for name in ("data", "data_dir", "seed", "limit")} | own


def _is_known(data: Any) -> bool:
    return data in (*NAMES, *CLOUDS)


def began(
    config: Mapping[str, Any],
    data: Dataset,
    data_dir: Path | None,
    *,
    plan: Path | None = None,
    **networks: nn.Module | None,
) -> Config:
    """The configuration of a new run on `data`, with fingerprints of data, plan and the networks that it starts from.

    `networks` are named by the setting that holds their path (`teacher`, `taught_by` or `source`); None is left out.
    Raises ShoalError when the plan cannot be read.
    """
    found = {"data": data.fingerprint()}
    found |= {name: checksum(network.state_dict(), {}) for name, network in networks.items() if network is not None}
    if plan is not None:
        found["plan"] = hashlib.sha256(json.dumps(read_json(plan), sort_keys=True).encode()).hexdigest()
    return absolute(placed(config, data_dir)) | {FINGERPRINTS: found}


def absolute(config: Mapping[str, Any]) -> Config:
    """The configuration with absolute paths, so that the run can be used from any folder."""
    paths = {key: Path(config[key]).absolute() for key in (*PLACES.values(), CACHE) if config.get(key) is not None}
    if not _is_known(config["data"]) and config["data"] != _FOLDER:
        paths["data"] = Path(config["data"]).expanduser().absolute()
    return {**config, **paths}


def fingerprints(config: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprints in a configuration; empty for a run of an earlier version."""
    found = config.get(FINGERPRINTS)
    return dict(found) if isinstance(found, dict) else {}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first setting in which two configurations differ, apart from paths and fingerprints; None if they agree."""
    keys = [key for key in {**old, **new} if key not in (FINGERPRINTS, CACHE, "data_dir")]
    return next((key for key in keys if _setting(key, old.get(key)) != _setting(key, new.get(key))), None)


def _setting(key: str, value: Any) -> Any:
    """The value of a setting to compare; for a path, only whether there is one."""
    if key in PLACES.values():
        return value is not None
    return _FOLDER if key == "data" and isinstance(value, str) and not _is_known(value) else value


def check_origins(folder: Path, known: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ShoalError when a fingerprint in `new` differs from the one in `known`, of the run at `folder`."""
    for name, digest in fingerprints(new).items():
        if known.get(name, digest) != digest:
            what, do = _ADVICE.get(name, _NETWORK)
            place = new.get(PLACES[name]) or new.get(name)
            raise ShoalError(
                f"found {what} at {place} than the run at {folder} began with; need the same to resume; {do}, or "
                "choose another --out"
            )


def updated(old: Mapping[str, Any], new: Mapping[str, Any]) -> Config:
    """The configuration `old` with the paths in `new`, and those fingerprints in `new` that `old` lacks."""
    places = {key: new[key] for key in ("data", CACHE, *PLACES.values()) if key in new}
    found = fingerprints(new) | fingerprints(old)
    return {**old, **places} | ({FINGERPRINTS: found} if found else {})
