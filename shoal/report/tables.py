"""Tables of runs: baseline, reduced and their ratio; and one flat row per run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from shoal.report.layout import Grid
from shoal.report.record import ROWS, SIDES, Record, look_up
from shoal.storage.files import replacing
from shoal.storage.summary import Figures, Summary
from shoal.units import count, percent, points, ratio


def comparison(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Rows (label, baseline, reduced, ratio) of the table. Rows that neither network has are left out.

    Without figures of the reduced network, as for a teacher alone, its cells are empty.
    """
    rows = []
    absent = {side: "not measured" if summary.side(side) else "" for side in SIDES}
    for path, label, show in ROWS:
        old, new = (look_up(summary.side(side), path) for side in ("baseline", "reduced"))
        if old is None and new is None:
            continue
        shown = [absent[side] if v is None else show(v) for side, v in zip(SIDES, (old, new), strict=True)]
        rows.append((label, shown[0], shown[1], _ratio(path, old, new)))
    return rows


def _ratio(path: str, old: float | None, new: float | None) -> str:
    if old is None or new is None:
        return ""
    return f"{points(new - old)} points" if path == "accuracy" else ratio(old, new)


def comparison_table(summary: Summary) -> Grid:
    """The comparison as a table.

    Remarks below it give both counts of MACs with replaced blocks, and the figures of narrower widths.
    """
    title = f"{summary.model} on {summary.data}, seed {summary.seed}"
    head = ["", "baseline", "reduced", "reduced beside baseline"]
    return Grid(title, head, comparison(summary), caption="\n".join(_remarks(summary)))


def remarks_on_tests(networks: Mapping[str, Figures | None]) -> list[str]:
    """Lines with the largest and last test accuracies of networks by name; none for those that do not have them."""
    known = {name: own for name, own in networks.items() if own is not None and "largest_on_test" in own}
    if not known:
        return []
    largest = ", ".join(f"{name} {percent(own['largest_on_test'])}" for name, own in known.items())
    last = ", ".join(f"{name} {percent(own['last_on_test'])}" for name, own in known.items())
    return [
        f"largest test accuracy of all epochs, selected on the test set, %: {largest}",
        f"test accuracy after the last epoch, %: {last}",
    ]


def _remarks(summary: Summary) -> list[str]:
    macs, remarks = summary.reduced.get("macs_accounting"), list[str]()
    remarks += remarks_on_tests({"baseline": summary.baseline, "reduced": summary.reduced})
    if macs and macs["honest"] != macs["paper"]:
        honest, paper = macs["honest"], macs["paper"]
        remarks.append(f"MACs with replaced blocks, before exits are cut: {count(honest)}")
        remarks.append(f"MACs as the paper counts replaced blocks: {count(paper)}")
    for part, own in (summary.narrower or {}).items():
        counts = f"{count(own['relus'])} ReLUs, {count(own['macs'])} MACs"
        width = f"with {float(part):g} of the channels (widths/{float(part):g})"
        remarks.append(f"{width}: test accuracy {percent(own['accuracy'])} %, {counts}")
    return remarks


def facts(summary: Summary) -> dict[str, Any]:
    """How a run was made: number of test images, date, version of shoal, and machine; None if it was not stored."""
    found = summary.environment if isinstance(summary.environment, Mapping) else {}
    packages = found.get("packages")
    images = [n for side in SIDES if isinstance(n := summary.side(side).get("test_images"), int)]
    return {
        "test_images": images[0] if images else None,
        "date": _text(found.get("date")),
        "shoal": _text(packages.get("shoal") if isinstance(packages, Mapping) else None),
        "machine": _machine(found),
    }


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _machine(found: Mapping[str, object]) -> str | None:
    """The machine of an environment in words, such as ``AMD EPYC, 2 cores``; None if nothing is known of it."""
    cores = f"{found['cores']} cores" if isinstance(found.get("cores"), int) else None
    return ", ".join(filter(None, (_text(found.get("gpu")), _text(found.get("processor")), cores))) or None


def when(date: str | None) -> str | None:
    """An ISO date as text for people, such as ``2026-11-29 06:32 UTC``; any other text stays as it is."""
    try:
        return None if date is None else f"{datetime.fromisoformat(date).astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError):
        return date


def flat_row(record: Record) -> dict[str, Any]:
    """One row of figures of a run, with keys that begin with ``baseline.`` or ``reduced.``; None if not measured."""
    summary = record.summary
    row: dict[str, Any] = {"run": record.name, "data": summary.data, "seed": summary.seed} | facts(summary)
    for side in SIDES:
        row |= {f"{side}.{key}": look_up(summary.side(side), key) for key, _, _ in ROWS}
    return row


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows with the same keys as CSV. Raises ShoalError when the file cannot be written."""
    with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
