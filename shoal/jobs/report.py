"""What each command but those that train does, as functions that return JSON-ready data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shoal.costs.machine import Machine
from shoal.errors import ShoalError
from shoal.report import Record, flat_row, plot_curves, plot_pareto, read, write_csv
from shoal.report.forecast import Online, check_network_name, flat_online, online
from shoal.report.page import Link, render
from shoal.report.pareto import points
from shoal.report.published import published
from shoal.storage.files import write_text
from shoal.storage.run import Run


@dataclass(frozen=True)
class Asked:
    """Files that a report is to write, the network whose online seconds it forecasts, and a machine's constants."""

    csv: Path | None = None
    html: Path | None = None
    png: Path | None = None
    network: str | None = None
    machine: Path | None = None


def report(folders: list[Path], asked: Asked) -> list[dict[str, Any]]:
    """Flat rows of every run with a summary; draws each run's curves and writes what is asked for.

    Raises ShoalError when no folder has a summary, on foreign files, and for an unknown network or a foreign machine.
    """
    network = "none" if asked.network is None else asked.network
    check_network_name(network)
    machine = None if asked.machine is None else Machine.load(asked.machine)
    records = _records(folders)
    onlines: list[dict[str, Online]] = [{} for _ in records]
    if asked.html or asked.network:
        onlines = [online(record, network, machine) for record in records]
    rows = [flat_row(record) | flat_online(found) for record, found in zip(records, onlines, strict=True)]
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
    """The finished runs among `folders`; the others are named on standard error."""
    found = {folder: read(folder) for folder in folders}
    records = [record for record in found.values() if record is not None]
    if not records:
        raise ShoalError(f"found no summary.json in {[str(f) for f in folders]}; need runs of reduce or demo")
    for folder in (f for f, record in found.items() if record is None):
        Console(stderr=True).print(f"left out {folder}: no summary.json, so no finished reduction", markup=False)
    return records


def report_table(rows: list[dict[str, Any]]) -> Table:
    """Runs down, figures across."""
    table = Table(header_style="bold")
    shown: tuple[str, ...] = (
        "run",
        "data",
        "baseline.accuracy",
        "reduced.accuracy",
        "reduced.relus",
        "reduced.macs",
        "reduced.depth",
    )
    shown += ("baseline.private.online_s", "reduced.private.online_s")
    for name in shown:
        table.add_column(name, justify="left" if name in ("run", "data") else "right")
    for row in rows:
        cells = (f"{v:,.6g}" if isinstance(v := row.get(k), (int, float)) else str(v or "") for k in shown)
        table.add_row(*map(escape, cells))
    return table
