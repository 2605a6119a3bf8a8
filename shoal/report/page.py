"""The report as one self-contained HTML page: text and tables are written here, charts are drawn by its own script.

The page loads nothing from outside. Its data are in a JSON element, which browsers do not execute, and its content
security policy allows only its own script and style, by their hashes. The name of a run therefore cannot run code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from typing import Any

from shoal import units
from shoal.report.forecast import Online, flat_online
from shoal.report.pareto import AXES, Point, as_json, fronts, points
from shoal.report.published import CERTAINTY, Published, published
from shoal.report.record import SIDES, Record, look_up
from shoal.report.tables import comparison, facts, flat_row, when

AXIS_LABELS = {
    "relus": "ReLUs",
    "macs": "MACs of convolutions",
    "waits": "one-way latencies online",
    "online_s": "online, s",
}
SCRIPTS = ("charts.js", "downloads.js", "page.js")
"""Files that are joined to the page's script, in this order."""
NOT_STORED = "not stored"
LINK_TEXTS = {
    "none": "no network (TLS on loopback)",
    "lan": "LAN (3 Gbit/s, round trip of 0.3 ms)",
    "wan": "WAN (400 Mbit/s, round trip of 40 ms)",
}


@dataclass(frozen=True)
class Link:
    """The link of the online seconds, one of `costs.links.LINKS`, and whether a machine's constants were given."""

    name: str
    calibrated: bool

    def __str__(self) -> str:
        constants = "a calibrated machine" if self.calibrated else "the default machine"
        return f"{LINK_TEXTS[self.name]}; forecasts for {constants}"


@dataclass(frozen=True)
class Column:
    """One column of a table: its heading, its cells as (text, sort value), and whether it is right-aligned."""

    heading: str
    cells: Sequence[tuple[str, float | str]]
    numeric: bool = True


def render(records: Sequence[Record], onlines: Sequence[Mapping[str, Online]], link: Link) -> str:
    """The page for runs and their online phases, as HTML."""
    found = points(records, onlines)
    style, script = _asset("page.css"), "".join(_asset(name) for name in SCRIPTS)
    parts = {
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "data": _embedded(_data(records, onlines, found, link)),
        "summary": _text(_summary(records, found, link)),
        "runs": _table("runs-table", "Baseline and reduced network of every run", _run_columns(records, onlines)),
        "papers": _table("papers-table", "Figures as printed in the papers", paper_columns(published())),
        "certainty": "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in CERTAINTY.items()),
    }
    # One pass, so that marks in the inserted text are not replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return files("shoal.report").joinpath(name).read_text(encoding="utf-8")


def _text(text: str) -> str:
    """`text` escaped as ASCII HTML: the page is the same in every encoding, even with undecodable file names."""
    return escape(text).encode("ascii", "xmlcharrefreplace").decode()


def _breakable(text: str) -> str:
    """`text` escaped, which may be broken into lines after the separators of a path, and nowhere else if that fits."""
    return "<wbr>".join(_text(part) for part in re.split(r"(?<=[/_=-])(?=[^/_=-])", text))


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(body: Any) -> str:
    """JSON in which no string can close the enclosing element."""
    text = json.dumps(body, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _summary(records: Sequence[Record], found: Sequence[Point], link: Link) -> str:
    sets = ", ".join(sorted({p.data for p in found}))
    runs = f"{units.count(len(records))} run{'s' if len(records) > 1 else ''}"
    return f"{runs} on {sets}. Seconds online: {link}."


def _data(
    records: Sequence[Record], onlines: Sequence[Mapping[str, Online]], found: Sequence[Point], link: Link
) -> dict[str, Any]:
    """The data that the page's script draws."""
    over = "no network" if link.name == "none" else link.name.upper()
    labels = AXIS_LABELS | {"online_s": f"online, s ({over})"}
    return {
        "axes": [{"key": key, "label": labels[key]} for key in AXES],
        "points": [as_json(point) for point in found],
        "fronts": fronts(found),
        "runs": [_run(record, online) for record, online in zip(records, onlines, strict=True)],
        "rows": [flat_row(record) | flat_online(online) for record, online in zip(records, onlines, strict=True)],
        "papers": [asdict(row) for row in published()],
    }


def _run(record: Record, online: Mapping[str, Online]) -> dict[str, Any]:
    return {
        "name": record.name,
        "data": record.summary.data,
        "alone": record.is_alone,
        "facts": _facts(record),
        "comparison": comparison(record.summary) + _private_rows(online),
        "sites": [asdict(site) for site in record.sites],
        "curves": list(record.curves.items()),
        "missing": [phase.why for phase in online.values() if phase.why],
    }


def _facts(record: Record) -> list[tuple[str, str]]:
    """How the run was made, as pairs of label and text."""
    found = facts(record.summary)
    images = found["test_images"]
    return [
        ("test images (n)", NOT_STORED if images is None else units.count(images)),
        ("seed", str(record.summary.seed)),
        ("date", when(found["date"]) or NOT_STORED),
        ("version of shoal", found["shoal"] or NOT_STORED),
        ("machine", found["machine"] or NOT_STORED),
    ]


def _private_rows(online: Mapping[str, Online]) -> list[tuple[str, str, str, str]]:
    """The rows of the forecast, which follow those of the run's summary."""
    rows = []
    for name, label, show in (
        ("waits", "one-way latencies online", units.count),
        ("forecast_s", "forecast: online, s", units.seconds),
    ):
        old, new = (getattr(online.get(side), name, None) for side in SIDES)
        pairs = zip(SIDES, (old, new), strict=True)
        shown = [("no forecast" if side in online else "") if v is None else show(v) for side, v in pairs]
        rows.append((label, shown[0], shown[1], units.ratio(old or 0, new or 0)))
    return rows


def _run_columns(records: Sequence[Record], onlines: Sequence[Mapping[str, Online]]) -> list[Column]:
    columns = [
        Column("run", [(r.name, r.name) for r in records], numeric=False),
        Column("data", [(r.summary.data,) * 2 for r in records], numeric=False),
        Column("network", [(r.summary.model,) * 2 for r in records], numeric=False),
        Column("seed", [(str(r.summary.seed), r.summary.seed) for r in records]),
    ]
    for key, label, show in (
        ("accuracy", "test accuracy, %", units.percent),
        ("relus", "ReLUs", units.count),
        ("macs", "MACs", units.count),
    ):
        pairs = [[look_up(r.summary.side(side), key) for side in SIDES] for r in records]
        columns += _beside(label, pairs, show, gain=key == "accuracy")
    phases = [[online.get(side, Online()) for side in SIDES] for online in onlines]
    columns += _beside("one-way latencies online", [[own.waits for own in both] for both in phases], units.count)
    kinds = ["measured" if _are_measured(online) else "forecast" for online in onlines]
    seconds = [[own.as_kind(_are_measured(on)) for own in both] for on, both in zip(onlines, phases, strict=True)]
    columns += _beside("online, s", seconds, units.seconds)
    columns.append(Column("seconds measured or forecast", [(kind, kind) for kind in kinds], numeric=False))
    return columns + _fact_columns(records)


def _are_measured(online: Mapping[str, Online]) -> bool:
    """Whether the seconds of all networks of a run were measured; else the table compares forecasts."""
    return all(phase.measured_s is not None for phase in online.values())


def _fact_columns(records: Sequence[Record]) -> list[Column]:
    found = [facts(record.summary) for record in records]
    images = [row["test_images"] for row in found]
    columns = [Column("test images", [("", -1.0) if n is None else (units.count(n), n) for n in images])]
    columns.append(Column("date", [(when(row["date"]) or "", row["date"] or "") for row in found], numeric=False))
    for key, heading in (("shoal", "version of shoal"), ("machine", "machine")):
        columns.append(Column(heading, [(row[key] or "",) * 2 for row in found], numeric=False))
    return columns


def _beside(
    label: str, pairs: Sequence[Sequence[float | None]], show: Callable[[float], str], gain: bool = False
) -> list[Column]:
    """Three columns: baseline, reduced, and their comparison (points gained for accuracy, a ratio for a cost)."""
    compared = [_compared(old, new, gain) for old, new in pairs]
    ends = [[("", -1.0) if v is None else (show(v), v) for v in side] for side in zip(*pairs, strict=True)]
    heading = f"{label.removesuffix(', %')}: points gained" if gain else f"{label.removesuffix(', s')}: ratio"
    return [Column(f"{label}: baseline", ends[0]), Column(f"{label}: reduced", ends[1]), Column(heading, compared)]


def _compared(old: float | None, new: float | None, gain: bool) -> tuple[str, float]:
    """The text of the cell and its sort value."""
    if old is None or new is None or (not gain and not new):
        return "", -1.0
    return (units.points(new - old), new - old) if gain else (units.ratio(old, new), old / new)


def paper_columns(rows: Sequence[Published]) -> list[Column]:
    """The columns of the table of published networks; costs that are not printed are empty cells."""

    def texts(name: str) -> list[tuple[str, float | str]]:
        return [(getattr(row, name),) * 2 for row in rows]

    def costs(name: str, show: Callable[[float], str]) -> list[tuple[str, float | str]]:
        values = (getattr(row, name) for row in rows)
        return [("", -1.0) if value is None else (show(value), value) for value in values]

    return [
        Column("system", texts("system"), numeric=False),
        Column("data", texts("dataset"), numeric=False),
        Column("network", texts("network"), numeric=False),
        Column("ReLUs", costs("relus", units.count)),
        Column("test accuracy, %", [(f"{row.accuracy:g}", row.accuracy) for row in rows]),
        Column("DELPHI online, s", costs("latency_s", units.seconds)),
        Column("MACs", costs("macs", units.count)),
        Column("where it was read", texts("certainty"), numeric=False),
        Column("source", texts("source"), numeric=False),
        Column("note", texts("note"), numeric=False),
    ]


def _table(identifier: str, caption: str, columns: Sequence[Column]) -> str:
    """A table whose headings are buttons, by which the page's script sorts it."""
    head = "".join(
        f'<th scope="col"{_class(column)}><button type="button">{_text(column.heading)}</button></th>'
        for column in columns
    )
    body = "".join(
        "<tr>" + "".join(_cell(column, row) for column in columns) + "</tr>" for row in range(len(columns[0].cells))
    )
    return (
        f'<table id="{identifier}" class="sortable"><caption>{_text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _class(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _cell(column: Column, row: int) -> str:
    shown, value = column.cells[row]
    text = _text(shown) if column.numeric else _breakable(shown)
    return f'<td{_class(column)} data-sort="{_text(str(value))}">{text}</td>'
