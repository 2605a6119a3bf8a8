"""What `shoal analyse` does: studies of a run's network into a folder of plots and CSV files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from shoal.analysis import STUDIES, Subject, write
from shoal.errors import ShoalError
from shoal.exits.cascades import with_own_layers
from shoal.jobs.inputs import ARGUMENT, load_data
from shoal.networks.stored import load_whole
from shoal.storage.run import Run
from shoal.training.settings import Settings


@dataclass(frozen=True)
class Request:
    """What `shoal analyse` is asked for."""

    run: Path = field(metadata=ARGUMENT)
    """A run folder; its network may have one exit or several."""
    study: tuple[str, ...] = field(default=(), metadata={"values": STUDIES})
    """Make only this study (repeatable)."""
    out: Path | None = None
    """Where files go; RUN/analysis unless given."""
    images: int = 1000
    """Number of images to use, evenly spread over the test set; thresholds uses the whole set."""
    levels: tuple[float, ...] = (0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04)
    """flat-minimum: standard deviations of the noise, separated by commas."""
    seed: int = 0
    """Decides the noise."""
    data_dir: Path | None = None
    """Where the data set is, in its published layout."""
    device: str = "cpu"
    """cpu or cuda."""

    def check(self) -> None:
        """Raise ShoalError for an unknown study, no images, or noise levels that have no meaning."""
        unknown = [name for name in self.study if name not in STUDIES]
        if unknown or self.images < 1:
            raise ShoalError(
                f"found studies {unknown} and {self.images} images; need {', '.join(STUDIES)}, and 1 or more"
            )
        if not all(0 <= level < math.inf for level in self.levels):
            raise ShoalError(
                f"found noise levels {list(self.levels)}; need standard deviations of 0 or more; correct --levels"
            )


class Studied(TypedDict, total=False):
    """One study: the number of its rows, its files, and why it has none."""

    rows: int
    files: list[str]
    note: str


def analyse(request: Request) -> dict[str, Studied]:
    """Make the studies (none named: all) of a run; files go to `out`, or RUN/analysis, and replace older ones.

    Raises ShoalError for an unknown study, and for one asked for by name that this network cannot have.
    """
    request.check()
    run, settings = Run(request.run), Settings(seed=request.seed, device=request.device)
    settings.check()
    spec, model = load_whole(run)
    data = load_data(run.config(), request.data_dir, request.device)
    network = with_own_layers(model, spec.shape).to(request.device).eval()
    subject = Subject(network, data, request.images, request.levels, request.seed, settings)
    place = request.out if request.out is not None else request.run / "analysis"
    return {name: _study(name, subject, place, bool(request.study)) for name in request.study or STUDIES}


def _study(name: str, subject: Subject, place: Path, asked: bool) -> Studied:
    """One study; of those that nobody asked for by name, also why this network has none."""
    try:
        result, note = STUDIES[name](subject), "this network has none"
    except ShoalError as error:
        if asked:
            raise
        result, note = None, str(error)
    if result is None:
        return Studied(rows=0, files=[], note=note)
    place.mkdir(parents=True, exist_ok=True)
    write(name, result, place)
    return Studied(rows=len(result.rows), files=[str(place / f"{name}.{kind}") for kind in ("csv", "png")])
