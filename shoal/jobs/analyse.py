"""What `shoal analyse` does: studies of a run's network into a folder of plots and CSV files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.analysis import STUDIES, Subject, write
from shoal.errors import ShoalError
from shoal.exits.cascades import with_own_layers
from shoal.jobs.inputs import load_data
from shoal.networks.stored import load_whole
from shoal.storage.run import Run
from shoal.training.settings import Settings


def analyse(
    folder: Path,
    chosen: Sequence[str],
    out: Path | None,
    images: int,
    levels: Sequence[float],
    seed: int,
    data_dir: Path | None,
    device: str,
) -> dict[str, Any]:
    """Make the `chosen` studies (none: all) of a run; files go to `out`, or RUN/analysis, and replace older ones.

    Returns for each study its rows' number and its files, or why it has none. Raises ShoalError for an unknown study.
    """
    unknown = [name for name in chosen if name not in STUDIES]
    if unknown or images < 1:
        raise ShoalError(f"found studies {unknown} and {images} images; need {', '.join(STUDIES)}, and 1 or more")
    if not all(0 <= level < math.inf for level in levels):
        raise ShoalError(f"found noise levels {list(levels)}; need standard deviations of 0 or more; correct --levels")
    run, settings = Run(folder), Settings(seed=seed, device=device)
    settings.check()
    spec, model = load_whole(run)
    data = load_data(run.config(), data_dir, device)
    network = with_own_layers(model, spec.shape).to(device).eval()
    subject = Subject(network, data, images, tuple(levels), seed, settings)
    place = out if out is not None else folder / "analysis"
    return {name: _study(name, subject, place, bool(chosen)) for name in chosen or STUDIES}


def _study(name: str, subject: Subject, place: Path, asked: bool) -> dict[str, Any]:
    """One study; of those that nobody asked for by name, also why this network has none."""
    try:
        result, note = STUDIES[name](subject), "this network has none"
    except ShoalError as error:
        if asked:
            raise
        result, note = None, str(error)
    if result is None:
        return {"rows": 0, "files": [], "note": note}
    place.mkdir(parents=True, exist_ok=True)
    write(name, result, place)
    return {"rows": len(result.rows), "files": [str(place / f"{name}.{kind}") for kind in ("csv", "png")]}
