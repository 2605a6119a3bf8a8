"""Reports: laws of the front and of means over seeds, the papers' table, a page that loads nothing and runs no name."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.costs.links import LINKS
from shoal.costs.machine import Machine
from shoal.costs.model import layout_of, prepared_cost
from shoal.errors import ShoalError
from shoal.graph.folding import fold
from shoal.jobs import report as commands
from shoal.jobs.report import Asked
from shoal.networks.stored import load_network
from shoal.report import page as page_module
from shoal.report import read
from shoal.report.forecast import Online, online
from shoal.report.page import Link, render
from shoal.report.pareto import AXES, Point, fronts, points
from shoal.report.published import published
from shoal.storage.run import Run
from shoal.surgery.tracing import trace
from tests.support.finished import BASE, SIZES, finished, measured, with_networks

HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=alert(1)> &amp; \"'"

# ---------------------------------------------------------------- fronts


def test_front_keeps_data_sets_and_missing_costs_apart(tmp_path: Path) -> None:
    folders = [finished(tmp_path / "a", 500, 90.0), finished(tmp_path / "b", 900, 80.0, data="svhn")]
    found = points_of(*folders)
    lines = fronts(found)
    assert {found[i].label for i in lines["digits"]["relus"]["counted"]} == {str(folders[0]), "resnet10, all ReLUs"}
    assert [found[i].data for i in lines["svhn"]["relus"]["counted"]] == ["svhn", "svhn"]
    assert lines["digits"]["online_s"] == lines["digits"]["waits"] == {}  # nothing stored to forecast from


def seconds_of(name: str, accuracy: float, seconds: float, measured: bool) -> Point:
    costs = {"relus": 100.0, "macs": 100.0, "waits": None, "online_s": seconds}
    return Point(name, "reduced", "digits", accuracy, None, costs, (0,), (0,), measured)


def test_measured_and_forecast_seconds_have_a_front_each() -> None:
    """A forecast of 0.1 s would hide every measured point if the two were compared."""
    rows = [("a", 80.0, 1.0, True), ("b", 90.0, 2.0, True), ("c", 85.0, 3.0, True), ("d", 95.0, 0.1, False)]
    found = fronts([seconds_of(*row) for row in rows])["digits"]
    assert found["online_s"] == {"measured": [0, 1], "forecast": [3]}
    assert found["relus"] == {"counted": [3]}
    assert found["waits"] == {}


# ---------------------------------------------------------------- points


def records_of(*folders: Path) -> list[Any]:
    return [read(folder) for folder in folders]


def points_of(*folders: Path) -> list[Point]:
    records = records_of(*folders)
    return points(records, [online(r, "none", None) for r in records])


def test_runs_that_differ_by_seed_only_are_one_point(tmp_path: Path) -> None:
    accuracies = [88.0, 90.0, 91.0]
    folders = [finished(tmp_path / f"s{i}", 500 + i, a, seed=i, epochs="1,1,3") for i, a in enumerate(accuracies)]
    folders.append(finished(tmp_path / "longer", 500, 91.5, seed=0, epochs="2,2,6"))
    reduced = [p for p in points_of(*folders) if p.side == "reduced"]
    assert sorted(len(p.records) for p in reduced) == [1, 3]
    group = next(p for p in reduced if len(p.records) == 3)
    assert group.label == f"{folders[0]} and 2 other seeds"
    assert (group.accuracy, group.spread) == (mean(accuracies), stdev(accuracies))
    assert (group.costs["relus"], group.seeds) == (501, (0, 1, 2))


@pytest.mark.parametrize("other", [{"epochs": "9"}, {"data": "svhn"}, {"seed": 0}])
def test_other_settings_or_the_same_seed_twice_are_two_points(other: dict[str, Any], tmp_path: Path) -> None:
    folders = [finished(tmp_path / "a", 500, 88.0), finished(tmp_path / "b", 500, 90.0, **({"seed": 1} | other))]
    found = [p for p in points_of(*folders) if p.side == "reduced"]
    assert [p.spread for p in found] == [None, None]


def test_a_shared_baseline_is_one_point(tmp_path: Path) -> None:
    folders = [finished(tmp_path / name, relus, 88.0) for name, relus in (("a", 500), ("b", 700))]
    baselines = [p for p in points_of(*folders) if p.side == "baseline"]
    assert [(p.accuracy, p.costs["relus"]) for p in baselines] == [(BASE["accuracy"], BASE["relus"])]


def test_a_shared_baseline_takes_the_seconds_that_were_measured(tmp_path: Path) -> None:
    folders = [finished(tmp_path / "a", 500, 88.0), measured(finished(tmp_path / "b", 700, 88.0), 0.02)]
    assert [(p.measured, p.costs["online_s"]) for p in points_of(*folders) if p.side == "baseline"] == [(True, 0.04)]


def test_measured_and_forecast_seconds_are_not_averaged(stored: Path, tmp_path: Path) -> None:
    other = finished(tmp_path / "other", 500, 91.0, seed=1)
    records = records_of(stored, other)
    onlines = [online(records[0], "none", None), {"reduced": Online(38, None, 0.5), "baseline": Online()}]
    for side, seconds in (("reduced", (0.5 + (onlines[0]["reduced"].forecast_s or 0)) / 2), ("baseline", None)):
        found = next(p for p in points(records, onlines) if p.side == side)
        assert (found.costs["online_s"], found.measured) == (seconds, False)


# ---------------------------------------------------------------- forecasts


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured(with_networks(finished(tmp_path_factory.mktemp("runs") / "stored", 500, 90.0)), 0.02)


def test_forecast_is_the_cost_model_s(stored: Path) -> None:
    record, machine = read(stored), Machine(exchange_s=1e-3)
    assert record is not None
    spec, model = load_network(Run(stored))
    layout = layout_of(fold(trace(model, spec.shape)))
    for name, network in LINKS.items():
        expected = prepared_cost(layout, machine, network).online
        found = online(record, name, machine)["reduced"]
        assert (found.forecast_s, found.waits) == (expected.seconds, layout.online.latencies)
        assert found.seconds == (0.02 if name == "none" else expected.seconds)  # measured on loopback only


def test_a_run_without_networks_says_why_it_has_no_forecast(tmp_path: Path) -> None:
    record = read(finished(tmp_path / "bare", 500, 90.0))
    assert record is not None
    found = online(record, "lan", None)
    assert found["reduced"].seconds is None
    assert "no finished network 'model'" in found["reduced"].why
    assert found["reduced"].why in page_data(render([record], [found], Link("lan", False)))["runs"][0]["missing"]


# ---------------------------------------------------------------- the page


def page_data(page: str) -> dict[str, Any]:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert text is not None
    return dict(json.loads(text[1]))


def rendered(*folders: Path) -> str:
    records = records_of(*folders)
    return render(records, [online(r, "none", None) for r in records], Link("none", False))


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_page_loads_nothing(stored: Path) -> None:
    page = rendered(stored)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|\bfetch\(|XMLHttp|\bimport\(", page)
    for tag, attributes in _Tags(page).found:
        assert "src" not in attributes
        assert attributes.get("href", "#")[0] == "#" or attributes["href"] == "data:,"
        assert tag not in ("iframe", "object", "embed", "img", "base", "form")


def test_policy_allows_the_page_s_own_script_and_style_alone(stored: Path) -> None:
    page = rendered(stored)
    policy = next(a["content"] for _, a in _Tags(page).found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for kind, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("where", ["folder", "data", "model", "site", "stage", "replaced"])
def test_hostile_names_stay_text(where: str, tmp_path: Path) -> None:
    folder = finished(tmp_path / (HOSTILE.replace("/", "") if where == "folder" else "run"), 500, 90.0)
    run = Run(folder)
    summary, budget = run.read_json("summary.json"), run.read_json("budget.json")
    if where in ("data", "model"):
        summary[where] = HOSTILE
    elif where == "replaced":
        summary["reduced"]["replaced_blocks"] = [HOSTILE]
    elif where == "site":
        budget = {key: {HOSTILE: 100} for key in budget}
    elif where == "stage":
        run.log(HOSTILE, {"accuracy": 50.0})
    run.write_json("summary.json", summary)
    run.write_json("budget.json", budget)
    page = rendered(folder)
    plain = rendered(finished(tmp_path / "plain", 500, 90.0))
    tags = [[tag for tag, _ in _Tags(text).found if tag != "wbr"] for text in (page, plain)]
    assert tags[0] == tags[1]
    if where != "replaced":  # nothing but the bars' colours comes from there
        name = str(folder) if where == "folder" else HOSTILE
        assert any(name in text for text in _strings(page_data(page)))


def _strings(body: Any) -> list[str]:
    if isinstance(body, dict):
        return [s for k, v in body.items() for s in (k, *_strings(v))]
    return [s for v in body for s in _strings(v)] if isinstance(body, list) else [body] if isinstance(body, str) else []


def test_page_is_plain_ascii_whatever_the_names(tmp_path: Path) -> None:
    folder = finished(tmp_path / "caf\u00e9 \udcff", 500, 90.0, data="\u6570")
    page = rendered(folder)
    assert page.isascii()
    assert page_data(page)["runs"][0]["name"] == str(folder)


def test_page_holds_sites_curves_and_comparison(stored: Path) -> None:
    run = page_data(rendered(stored))["runs"][0]
    assert {s["name"]: s["relus"] for s in run["sites"]} == SIZES
    assert [s["name"] for s in run["sites"] if s["replaced"]] == ["layer1.0.relu1"]
    assert [(stage, len(rows)) for stage, rows in run["curves"]] == [("sensitivity", 2), ("mask", 3), ("finetune", 5)]
    assert [row[0] for _, rows in run["curves"] for row in rows] == list(range(1, 11))
    assert ["ReLUs", "11,264", "500", "22.53x lower"] in run["comparison"]


def test_tables_are_there_without_the_script(stored: Path) -> None:
    page = rendered(stored)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page.replace("<wbr>", ""))
    assert {str(stored), "11,264", "500", "22.53x lower", "-2.00", "0.0200", "measured"} <= set(cells)
    assert cells.count("DeepReDuce") == sum(row.system == "DeepReDuce" for row in published())


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of the luminances of two colours like #0072b2."""
    light = []
    for colour in (one, other):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(light) / min(light)


def test_colours_can_be_read_in_every_theme() -> None:
    style = (Path(page_module.__file__).parent / "page.css").read_text()
    themes = [dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", block)) for block in re.findall(r"\{([^{}]*)\}", style)]
    themes = [theme for theme in themes if "c0" in theme]
    assert len(themes) == 3
    assert themes[1] == themes[2]  # dark by the toggle and by the system's setting
    for theme in themes:
        assert min(contrast(theme[name], theme["page"]) for name in ("ink", "soft")) >= 4.5
        marks = ("own", "base", "pick", "focus", *(f"c{i}" for i in range(6)))
        assert min(contrast(theme[name], theme["page"]) for name in marks) >= 3
        assert contrast(theme["own"], theme["track"]) >= 3


# ---------------------------------------------------------------- the command


def test_report_writes_page_picture_and_rows(stored: Path, tmp_path: Path) -> None:
    teacher = Run.create(tmp_path / "teacher", {"command": "train", "data": "digits", "seed": 0})
    words = ["report", str(stored), str(teacher.folder), "--network", "wan", "--json"]
    for kind in ("html", "png", "csv"):
        words += [f"--{kind}", str(tmp_path / f"report.{kind}")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert f"leftout{teacher.folder}:nofinishedrun" in re.sub(r"\s", "", done.stderr)
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert "WAN" in (tmp_path / "report.html").read_text()
    row = next(csv.DictReader((tmp_path / "report.csv").read_text().splitlines()))
    assert float(row["reduced.waits"]) > 0
    assert float(row["reduced.online_forecast_s"]) > 0.04 / 2  # one wait on the WAN at least
    assert json.loads(done.stdout)[0]["reduced.online_forecast_s"] == float(row["reduced.online_forecast_s"])


BAD = [
    (Asked(network="moon"), "link 'moon'"),
    (Asked(network=""), "link ''"),
    (Asked(machine=Path("nowhere.json")), "nowhere.json"),
]


@pytest.mark.parametrize(("asked", "pattern"), BAD)
def test_bad_requests_fail_before_any_work(asked: Asked, pattern: str, tmp_path: Path) -> None:
    folder = finished(tmp_path / "run", 500, 90.0)
    with pytest.raises(ShoalError, match=pattern):
        commands.report([folder], asked)
    assert not (folder / "curves.png").exists()


def test_points_name_every_axis(stored: Path) -> None:
    for point in points_of(stored):
        assert set(point.costs) == set(AXES)
        assert None not in point.costs.values()
        assert point.measured
    assert Online().seconds is None
