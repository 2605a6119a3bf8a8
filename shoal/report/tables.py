"""Tables of runs: baseline beside reduced beside ratio, and one flat row a run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from shoal.report.record import ROWS, SIDES, Record, Summary, look_up
from shoal.storage.files import replacing


def comparison(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Rows (what, baseline, reduced, ratio) of the table; rows that neither network has are left out."""
    rows = []
    for path, label, form in ROWS:
        old, new = (look_up(summary[side], path) for side in ("baseline", "reduced"))
        if old is None and new is None:
            continue
        shown = ["not measured" if v is None else form.format(v) for v in (old, new)]
        rows.append((label, shown[0], shown[1], _ratio(path, old, new)))
    return rows


def _ratio(path: str, old: float | None, new: float | None) -> str:
    if old is None or new is None:
        return ""
    if path == "accuracy":
        return f"{new - old:+.2f} points"
    return f"{old / new:.2f}x" if new else ""


def comparison_table(summary: Summary) -> Table:
    """The table, baseline beside reduced beside ratio, with both accountings of replaced blocks below."""
    title = f"{summary['model']} on {summary['data']}, seed {summary['seed']}"
    table = Table(title=escape(title), header_style="bold")
    for i, name in enumerate(("", "baseline", "reduced", "ratio")):
        table.add_column(name, justify="right" if i else "left")
    for row in comparison(summary):
        table.add_row(*row)
    table.caption = "\n".join(_remarks(summary)) or None
    return table


def _remarks(summary: Summary) -> list[str]:
    macs, remarks = summary["reduced"].get("macs_accounting"), []
    if macs and macs["honest"] != macs["paper"]:
        honest, paper = macs["honest"], macs["paper"]
        remarks.append(f"MACs after gating, before cutting exits: {honest:,}; as the paper counts: {paper:,}")
    for part, own in summary.get("narrower", {}).items():
        counts = f"{own['relus']:,} ReLUs, {own['macs']:,} MACs"
        remarks.append(
            f"at {float(part):g} of the channels (widths/{float(part):g}): {own['accuracy']:.2f} %, {counts}"
        )
    return remarks


def flat_row(record: Record) -> dict[str, Any]:
    """One row of figures of a run, by ``baseline.`` and ``reduced.`` names; None where nothing was measured."""
    summary = record.summary
    row: dict[str, Any] = {"run": record.name, "data": summary["data"], "seed": summary["seed"]}
    for side in SIDES:
        row |= {f"{side}.{key}": look_up(summary[side], key) for key, _, _ in ROWS}
    return row


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows with the same keys as CSV. Raises ShoalError when it cannot be written."""
    with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
