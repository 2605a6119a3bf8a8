"""The job of `shoal report`: compare runs in a table, a CSV file, an HTML page or a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from shoal import units
from shoal.costs.machine import Machine
from shoal.errors import ShoalError
from shoal.jobs.options import LINK
from shoal.report import Record, flat_row, plot_curves, plot_pareto, read, write_csv
from shoal.report.forecast import Online, check_network_name, flat_online, online
from shoal.report.layout import Grid, distinct
from shoal.report.page import Link, render
from shoal.report.pareto import points
from shoal.report.published import published
from shoal.storage.files import write_text
from shoal.storage.run import Run
from shoal.sweep.folder import run_folders


@dataclass(frozen=True)
class Asked:
    """The options of `shoal report`: files to write, and the link and machine of forecasts."""

    csv: Path | None = None
    """Also write the figures of all runs to this CSV file."""
    html: Path | None = None
    """Also write an HTML page with all charts to this file."""
    png: Path | None = None
    """Also draw accuracy against ReLUs, with the Pareto front, to this PNG file."""
    network: str | None = field(default=None, metadata=LINK)
    """Add forecasts of the online seconds over this link: none, lan or wan. If left out, only --html has them, without
    link delays."""
    machine: Path | None = None
    """For forecasts: JSON file from shoal calibrate with the measured speed of a machine. If left out: the speed of two
    cores that both parties share."""


Row = Mapping[str, Any]
"""The figures of one run by dotted name, such as ``reduced.relus``."""


def report(given: list[Path], asked: Asked) -> list[Row]:
    """Return a flat row for each run that has figures; draws each run's curves and writes the chosen files.

    A folder of a sweep stands for all of its runs. Raises ShoalError when no run has figures, for files that shoal did
    not write, and for an unknown link.
    """
    network = "none" if asked.network is None else asked.network
    check_network_name(network)
    machine = None if asked.machine is None else Machine.load(asked.machine)
    folders = list(dict.fromkeys(run for folder in given for run in run_folders(folder) or [folder]))
    records = _records(folders)
    onlines: list[dict[str, Online]] = [{} for _ in records]
    if asked.html or asked.network:
        onlines = [online(record, network, machine) for record in records]
    rows: list[Row] = [flat_row(record) | flat_online(found) for record, found in zip(records, onlines, strict=True)]
    for folder in folders:
        if Run(folder).has("metrics.jsonl"):
            plot_curves(Run(folder), folder / "curves.png")
    if asked.csv is not None:
        write_csv(rows, asked.csv)
    if asked.png is not None:
        plot_pareto(points(records, onlines), published(), asked.png)
    if asked.html is not None:
        write_text(asked.html, render(records, onlines, Link(network, machine is not None)))
    return rows


def _records(folders: list[Path]) -> list[Record]:
    """The runs with figures among `folders`; prints the names of the others on standard error."""
    found = {folder: read(folder) for folder in folders}
    records = [record for record in found.values() if record is not None]
    if not records:
        raise ShoalError(
            f"found no summary.json and no figures.json in {[str(f) for f in folders]}; need finished runs or the "
            "folder of a sweep; shoal evaluate RUN stores the figures of a network that has none"
        )
    for folder in (f for f, record in found.items() if record is None):
        Console(stderr=True).print(_left_out(folder), markup=False)
    return records


def _left_out(folder: Path) -> str:
    """Why a folder is not in the report, and what to do."""
    if Run(folder).has("model.json"):
        return f"left out {folder}: no stored test accuracy; run shoal evaluate {folder} once, then report again"
    return f"left out {folder}: no finished run (no summary.json and no figures.json)"


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("accuracy", "test accuracy, %", units.percent),
    ("gain", "gain, points", units.points),
    ("test_images", "test images", units.count),
    ("relus", "ReLUs", units.count),
    ("macs", "MACs, millions", units.millions),
    ("depth", "depth", units.count),
    ("prepared.offline_s", "offline, s", units.seconds),
    ("prepared.online_s", "online, s", units.seconds),
    ("online_forecast_s", "forecast online, s", units.seconds),
    ("waits", "one-way latencies", units.count),
)
"""Columns as (name of the figure, heading, formatter). `gain` is accuracy minus that of the baseline, in points."""


def report_table(rows: list[Row]) -> Grid:
    """A table with a row for each run, and a column for each figure that at least one run has.

    Figures are those of the reduced network, or of the only network of a run.
    """
    sets = {row["data"] for row in rows}
    found = [_figures(row) for row in rows]
    shown = [column for column in COLUMNS if any(own.get(column[0]) is not None for own in found)]
    cells = []
    for name, row, own in zip(distinct([row["run"] for row in rows]), rows, found, strict=True):
        figures = ["" if (value := own.get(key)) is None else show(value) for key, _, show in shown]
        cells.append([name, *([row["data"]] if len(sets) > 1 else []), *figures])
    head = ["run", *(["data"] if len(sets) > 1 else []), *(heading for _, heading, _ in shown)]
    title = "networks" if any(row["reduced.accuracy"] is None for row in rows) else "reduced networks"
    title += "" if len(sets) > 1 else f" on {next(iter(sets))}"
    return Grid(title, head, cells, texts=(0, 1) if len(sets) > 1 else (0,), shorten=True)


def _figures(row: Row) -> dict[str, Any]:
    """The figures of a row's reduced network, or of its only network, by the names in `COLUMNS`."""
    alone = row["reduced.accuracy"] is None
    side = "baseline" if alone else "reduced"
    gain = None if alone else row["reduced.accuracy"] - row["baseline.accuracy"]
    own = {key: row.get(f"{side}.{key}") for key, _, _ in COLUMNS}
    return own | {"gain": gain, "test_images": row["test_images"]}
