"""The report as one self-contained HTML page: its text and tables made here, its charts by the page's own script.

Nothing is loaded from outside. The data lie in a JSON element that no browser runs, and the page's content security
policy allows its own script and style by their hashes alone, so a run's name cannot run code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from typing import Any

from shoal.report.forecast import Online
from shoal.report.pareto import AXES, Point, as_json, fronts, points
from shoal.report.published import CERTAINTY, Published, published
from shoal.report.record import Record, look_up
from shoal.report.tables import comparison

AXIS_LABELS = {
    "relus": "ReLUs",
    "macs": "MACs",
    "waits": "one-way latencies online",
    "online_s": "seconds online",
}
NETWORK_TEXTS = {
    "none": "no network (TLS on loopback)",
    "lan": "LAN (3 Gbit/s, 0.3 ms there and back)",
    "wan": "WAN (400 Mbit/s, 40 ms there and back)",
}


@dataclass(frozen=True)
class Link:
    """What seconds are forecast for: one of `costs.links.LINKS`, and whether a machine's own constants were given."""

    network: str
    calibrated: bool

    def __str__(self) -> str:
        constants = "constants that were calibrated" if self.calibrated else "the default constants"
        return f"{NETWORK_TEXTS[self.network]}, {constants}"


@dataclass(frozen=True)
class Column:
    """One column of a table: heading, cells as (shown, sort value), whether numbers are right-aligned."""

    heading: str
    cells: Sequence[tuple[str, float | str]]
    numeric: bool = True


def render(records: Sequence[Record], onlines: Sequence[Mapping[str, Online]], link: Link) -> str:
    """The page for runs and their online phases."""
    found = points(records, onlines)
    style, script = _asset("page.css"), _asset("charts.js") + _asset("page.js")
    parts = {
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "data": _embedded(_data(records, onlines, found, link)),
        "summary": _text(_summary(records, found, link)),
        "runs": _table("runs-table", "Baseline beside reduced beside ratio", _run_columns(records, onlines)),
        "papers": _table("papers-table", "As printed", _paper_columns(published())),
        "certainty": "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in CERTAINTY.items()),
    }
    # One pass: what is put in is never searched for further marks.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return files("shoal.report").joinpath(name).read_text(encoding="utf-8")


def _text(text: str) -> str:
    """Text as HTML in ASCII, so that the page is the same in every encoding, undecodable file names included."""
    return escape(text).encode("ascii", "xmlcharrefreplace").decode()


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(body: Any) -> str:
    """JSON that cannot end its element, whatever the strings in it."""
    text = json.dumps(body, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _summary(records: Sequence[Record], found: Sequence[Point], link: Link) -> str:
    sets = ", ".join(sorted({p.data for p in found}))
    return f"{len(records)} runs on {sets}. Online seconds: {link}."


def _data(
    records: Sequence[Record], onlines: Sequence[Mapping[str, Online]], found: Sequence[Point], link: Link
) -> dict[str, Any]:
    """What the page's script draws."""
    labels = AXIS_LABELS | {"online_s": f"seconds online, {link.network if link.network != 'none' else 'no network'}"}
    return {
        "axes": [{"key": key, "label": labels[key]} for key in AXES],
        "points": [as_json(point) for point in found],
        "fronts": fronts(found),
        "runs": [_run(record, online) for record, online in zip(records, onlines, strict=True)],
        "papers": [asdict(row) for row in published()],
    }


def _run(record: Record, online: Mapping[str, Online]) -> dict[str, Any]:
    return {
        "name": record.name,
        "data": record.summary["data"],
        "comparison": comparison(record.summary) + _private_rows(online),
        "sites": [asdict(site) for site in record.sites],
        "curves": list(record.curves.items()),
        "missing": [phase.why for phase in online.values() if phase.why],
    }


def _private_rows(online: Mapping[str, Online]) -> list[tuple[str, str, str, str]]:
    """The forecast's rows below those of the run's own summary."""
    rows = []
    for name, label, form in (
        ("waits", "one-way latencies online", "{:,}"),
        ("forecast_s", "online, forecast, s", "{:.4f}"),
    ):
        old, new = (getattr(online[side], name) for side in ("baseline", "reduced"))
        shown = ["no forecast" if v is None else form.format(v) for v in (old, new)]
        rows.append((label, shown[0], shown[1], f"{old / new:.2f}x" if old and new else ""))
    return rows


def _run_columns(records: Sequence[Record], onlines: Sequence[Mapping[str, Online]]) -> list[Column]:
    columns = [
        Column("run", [(r.name, r.name) for r in records], numeric=False),
        Column("data", [(r.summary["data"],) * 2 for r in records], numeric=False),
        Column("network", [(r.summary["model"],) * 2 for r in records], numeric=False),
        Column("seed", [(str(r.summary["seed"]), r.summary["seed"]) for r in records]),
    ]
    for key, label, form in (
        ("accuracy", "accuracy, %", "{:.2f}"),
        ("relus", "ReLUs", "{:,}"),
        ("macs", "MACs", "{:,}"),
    ):
        pairs = [[look_up(r.summary[side], key) for side in ("baseline", "reduced")] for r in records]
        columns += _beside(label, pairs, form, gain=key == "accuracy")
    waits = [[online[side].waits for side in ("baseline", "reduced")] for online in onlines]
    seconds = [[online[side].seconds for side in ("baseline", "reduced")] for online in onlines]
    columns += _beside("latencies", waits, "{:,}") + _beside("online, s", seconds, "{:.4f}")
    kinds = ["measured" if o["reduced"].measured_s is not None else "forecast" for o in onlines]
    return [*columns, Column("seconds are", [(kind, kind) for kind in kinds], numeric=False)]


def _beside(label: str, pairs: Sequence[Sequence[float | None]], form: str, gain: bool = False) -> list[Column]:
    """Baseline, reduced and their ratio (the gain in points for an accuracy) as three columns."""
    ratios = [_ratio(old, new, gain) for old, new in pairs]
    shown = [("", -1.0) if r is None else (f"{r:+.2f}" if gain else f"{r:.2f}x", r) for r in ratios]
    ends = [[("none", -1.0) if v is None else (form.format(v), v) for v in side] for side in zip(*pairs, strict=True)]
    heading = f"{label}: gain" if gain else f"{label}: ratio"
    return [Column(f"{label}: baseline", ends[0]), Column(f"{label}: reduced", ends[1]), Column(heading, shown)]


def _ratio(old: float | None, new: float | None, gain: bool) -> float | None:
    if old is None or new is None or (not gain and not new):
        return None
    return new - old if gain else old / new


def _paper_columns(rows: Sequence[Published]) -> list[Column]:
    def texts(name: str) -> list[tuple[str, float | str]]:
        return [(getattr(row, name),) * 2 for row in rows]

    latencies: list[tuple[str, float | str]] = [
        ("", -1.0) if row.latency_s is None else (f"{row.latency_s:g}", row.latency_s) for row in rows
    ]
    return [
        Column("system", texts("system"), numeric=False),
        Column("data", texts("dataset"), numeric=False),
        Column("network", texts("network"), numeric=False),
        Column("ReLUs", [(f"{row.relus:,}", row.relus) for row in rows]),
        Column("accuracy, %", [(f"{row.accuracy:g}", row.accuracy) for row in rows]),
        Column("DELPHI online, s", latencies),
        Column("how sure", texts("certainty"), numeric=False),
        Column("source", texts("source"), numeric=False),
        Column("note", texts("note"), numeric=False),
    ]


def _table(identifier: str, caption: str, columns: Sequence[Column]) -> str:
    """A table whose headings are buttons that the page's script sorts by."""
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
    return f'<td{_class(column)} data-sort="{_text(str(value))}">{_text(shown)}</td>'
