"""The job of `shoal analyse`: study a run's network, and write plots and CSV files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from shoal.analysis import STUDIES, Subject, write
from shoal.errors import ShoalError
from shoal.exits.cascades import with_own_layers
from shoal.jobs.inputs import load_data
from shoal.jobs.options import ARGUMENT
from shoal.networks.stored import load_whole
from shoal.storage.run import Run
from shoal.training.settings import Settings


@dataclass(frozen=True)
class Request:
    """The options of `shoal analyse`."""

    run: Path = field(metadata=ARGUMENT)
    """A run folder; its network may have one exit or several."""
    study: tuple[str, ...] = field(default=(), metadata={"values": STUDIES})
    """Make only this study (repeatable)."""
    out: Path | None = None
    """Folder for the plots and CSV files; RUN/analysis if left out."""
    images: int = 1000
    """Number of test images to use, evenly spread over the set; the study thresholds uses all of them."""
    levels: tuple[float, ...] = (0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04)
    """For the study flat-minimum: standard deviations of the noise on the parameters, separated by commas."""
    seed: int = 0
    """Seed of the noise."""
    data_dir: Path | None = None
    """Folder with the data set in its published layout; the run's own if left out."""
    device: str = "cpu"
    """Device to compute on: cpu or cuda."""

    def check(self) -> None:
        """Raise ShoalError for an unknown study, no images, or negative or infinite noise levels."""
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
    """The result of one study: its number of rows, its files, or a note why there are none."""

    rows: int
    files: list[str]
    note: str


def analyse(request: Request) -> dict[str, Studied]:
    """Make the named studies of a run, or all; writes plots and CSV files and replaces older ones.

    Raises ShoalError for an unknown study, and for a named study that this network cannot have.
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
    """Make one study. If it is impossible, raise ShoalError when it was named, and otherwise return a note."""
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
