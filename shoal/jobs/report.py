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


def report(folders: list[Path], asked: Asked) -> list[Row]:
    """Return a flat row for each run that has a summary; draws each run's curves and writes the chosen files.

    Raises ShoalError when no folder has a summary, for files that shoal did not write, and for an unknown link.
    """
    network = "none" if asked.network is None else asked.network
    check_network_name(network)
    machine = None if asked.machine is None else Machine.load(asked.machine)
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
    """The finished runs among `folders`; prints the names of the others on standard error."""
    found = {folder: read(folder) for folder in folders}
    records = [record for record in found.values() if record is not None]
    if not records:
        raise ShoalError(f"found no summary.json in {[str(f) for f in folders]}; need runs of reduce or demo")
    for folder in (f for f, record in found.items() if record is None):
        Console(stderr=True).print(f"left out {folder}: no summary.json, so no finished reduction", markup=False)
    return records


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("reduced.accuracy", "test accuracy, %", units.percent),
    ("gain", "gain, points", units.points),
    ("reduced.relus", "ReLUs", units.count),
    ("reduced.macs", "MACs, millions", units.millions),
    ("reduced.depth", "depth", units.count),
    ("reduced.private.online_s", "direct, s", units.seconds),
    ("reduced.prepared.online_s", "online, s", units.seconds),
    ("reduced.online_forecast_s", "forecast online, s", units.seconds),
    ("reduced.waits", "one-way latencies", units.count),
)
"""Columns as (key of a flat row, heading, formatter). `gain` is accuracy minus that of the baseline, in points."""


def report_table(rows: list[Row]) -> Grid:
    """A table with a row for each run, and a column for each figure that at least one run has."""
    sets = {row["data"] for row in rows}
    rows = [{**row, "gain": row["reduced.accuracy"] - row["baseline.accuracy"]} for row in rows]
    shown = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    cells = []
    for name, row in zip(distinct([row["run"] for row in rows]), rows, strict=True):
        figures = ["" if (value := row.get(key)) is None else show(value) for key, _, show in shown]
        cells.append([name, *([row["data"]] if len(sets) > 1 else []), *figures])
    head = ["run", *(["data"] if len(sets) > 1 else []), *(heading for _, heading, _ in shown)]
    title = "reduced networks" if len(sets) > 1 else f"reduced networks on {next(iter(sets))}"
    return Grid(title, head, cells, texts=(0, 1) if len(sets) > 1 else (0,), shorten=True)
