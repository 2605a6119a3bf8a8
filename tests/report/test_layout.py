"""Tables on a terminal: no number is cut or wrapped at any width, no line is too long, and names stay apart."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from shoal.cli.costs import bench_table
from shoal.cli.distill import table as distill_table
from shoal.cli.exits import exits_table
from shoal.cli.inplace import anytime_table
from shoal.cli.self_distill import classifier_table
from shoal.costs.machine import Machine
from shoal.jobs import costs, deepreduce, inspect, plan, query
from shoal.jobs.report import report_table
from shoal.report import comparison_table, flat_row, read
from shoal.report.labels import LABELS
from shoal.report.layout import Grid, distinct, grid, pairs, shortened
from shoal.storage.summary import Summary
from shoal.sweep.results import HEADS, group_rows
from shoal.sweep.table import Metrics
from shoal.sweep.table import table as live_table
from tests.support.finished import finished, measured

FIGURES = {"accuracy": 71.678, "relus": 557_056, "macs": 555_417_600, "linear_macs": 51_200, "depth": 17}
FIGURES |= {"params": 11_220_132, "comparisons": 65_536, "quadratics": 0, "relu_layers": 17}


def shown(table: Any, width: int = 80) -> list[str]:
    console = Console(width=width, file=StringIO(), legacy_windows=False)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines()]


def check(table: Grid, width: int = 80) -> None:
    """No line is longer than `width`, and every number is on one line, whole."""
    lines = shown(table, width)
    assert max(map(cell_len, lines)) <= width
    words = {word for line in lines for word in line.split()}
    for row in table.rows:
        for i, cell in enumerate(row):
            if i not in table.texts:
                assert set(cell.split()) <= words, (cell, lines)


numbers = st.integers(0, 10**9).map(lambda n: f"{n:,}")


@given(
    st.integers(2, 12).flatmap(lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=1, max_size=4)),
    st.integers(60, 120),
    st.text("abc/-.", max_size=90),
)
def test_numbers_stay_whole_at_any_width(rows: list[list[str]], width: int, name: str) -> None:
    cells = [[f"{i}{name}", *row] for i, row in enumerate(rows)]
    head = ["run", *(f"one-way latencies {i}" for i in range(len(rows[0])))]
    check(grid("title", head, cells), width)


@given(st.lists(st.text("ab/-", min_size=1, max_size=40), min_size=1, max_size=5, unique=True), st.integers(4, 40))
def test_shortened_names_stay_apart(names: list[str], width: int) -> None:
    short = shortened(names, width)
    assert len(set(short)) == len(names)
    assert list(short) == names or max(map(cell_len, short)) <= width


def test_what_tells_paths_apart_is_kept() -> None:
    assert distinct(["runs/a", "runs/b"]) == ["a", "b"]
    assert distinct(["/x/runs/a/seed-0", "/x/runs/b/seed-0"]) == ["a/seed-0", "b/seed-0"]
    assert distinct(["runs/a"]) == ["a"]
    long = [f"resnet18-cifar100-budget-{i}-a-long-name-that-all-share" for i in range(2)]
    assert [name[-3:] for name in shortened(long, 14)] == ["-0\u2026", "-1\u2026"]


def test_a_report_s_rows_can_be_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 10) / "runs"
    folders = [measured(finished(folder / f"resnet18-budget-{i}", 28_672, 70.0, seed=i)) for i in range(3)]
    records = [read(f) for f in folders]
    table = report_table([flat_row(record) for record in records if record is not None])
    check(table)
    lines = shown(table)
    for i in range(3):
        assert sum(f"budget-{i}" in line for line in lines) == 1


# ---------------------------------------------------------------- every table of the commands, with example data


def designs() -> Summary:
    merging = {
        "folded": {"convs": 13, "macs": 555_417_600, "linear_macs": 51_200},
        "paper": {"convs": 9, "macs": 10**8},
    }
    row = {"name": "S2RT+S3RT+S4-a0.5-r0.5", "relus": 28_672, "validation": 70.1, "test": 69.9, "front": True}
    baseline = FIGURES | {"validation": 77.9, "merging": merging}
    head = {"model": "resnet18", "data": "tiny-imagenet", "seed": 600, "design": row["name"]}
    body = head | {"baseline": baseline, "reduced": baseline, "designs": [row | {"merging": merging}]}
    return Summary.of(body, Path("summary.json"))


def forecasts() -> dict[str, Any]:
    spent = {"seconds": 123.456, "bytes": 1_140_850_688, "rounds": 230.0}
    phases = dict.fromkeys(("offline", "online", "delphi"), spent)
    return {"networks": dict.fromkeys(("none", "lan", "wan"), phases)}


def candidates() -> Grid:
    forecast = {"relus": 557_056, "macs": 555_417_600, "depth": 17, "seconds": 0.1234, "bytes": 23e6, "latencies": 70}
    body = {"forecast": forecast, "keep": "auxiliary", "gated": ["a", "b"], "lost": 1.49, "width": 0.5, "resolution": 1}
    target = {"mode": "online", "network": "wan"}
    whole = {"candidates": [body] * 12, "target": target}
    return grid("resnet18", *plan.table(whole), caption=plan.footnote(whole))


def groups() -> Grid:
    mean = {f"reduced.{key}": float(value) for key, value in FIGURES.items()} | {"seconds": 4321.0}
    group = {"stage": "reduce", "axes": {"budget": 28_672, "model": "resnet18"}, "runs": 3}
    return grid("sweep", HEADS, group_rows({"groups": [group | {"mean": mean, "sd": dict.fromkeys(mean, 0.25)}]}))


def running() -> Grid:
    run = SimpleNamespace(name="reduce-budget-28672-model-resnet18-seed-1", folder=Path("nowhere"))
    fields = {"run": run, "state": "running", "result": {}, "elapsed": 4321.0, "attempts": 2}
    record: Any = SimpleNamespace(**fields)
    return live_table([record] * 3, Metrics(), 24)


def exits() -> Grid:
    one = {"accuracy": 71.678, "macs": 555_417_600}
    seconds = {str(batch): {"full": 0.0456, "dynamic": 0.0123, "speedup": 3.7} for batch in (64, 1)}
    test = one | {"shares": [0.5, 0.25, 0.25]}
    body = {"thresholds": [0.9123, 0.8], "exits": [one] * 3, "test": test, "seconds": seconds, "uncounted": []}
    body |= {"full": one, "lost": True, "baseline": one, "goal": {"loss": 0.0, "against": "baseline"}}
    return exits_table("runs/exits", body)


def classifiers() -> Grid:
    row = {"accuracy": 71.678, "params": 11_220_132, "relus": 557_056, "macs": 555_417_600, "cascaded_macs": 6 * 10**8}
    body = {"model": "resnet18", "data": "cifar100", "seed": 0, "after": ["layer1.1.relu2", "layer2.1.relu2"]}
    body |= {"exits": [row] * 3, "ensemble": {"logits": 78.1}, "baseline": FIGURES, "reduced": FIGURES}
    return classifier_table(Summary.of(body, Path("summary.json")))


def anytime() -> Grid:
    row = {"name": "widths/0.25", "accuracy": 71.678, "macs": 555_417_600, "macs_in_order": 10**9}
    budget = {"budget": 30e6, "accuracy": 70.0, "macs": 29.9e6}
    return anytime_table({"model": "msdnet-7", "data": "cifar100", "anytime": [row] * 4, "budgets": [budget]})


def answers() -> Grid:
    top = [{"class": name, "probability": 0.2} for name in ("aeroplane", "pickup_truck", "ship", "bird", "automobile")]
    result = {"image": "/data/images/a/long/way/down/to/the/file-0001.png", "top": top} | top[0]
    facts: dict[str, Any] = {"items_left": 3, "made": 2, "making_s": 7.5} | {
        "online_s": 0.0456,
        "setup_s": 13.9,
        "bytes": 845_000,
        "messages": 65,
        "latencies": 40,
    }
    return query.query_table(facts | {"results": [result]})


def measured_networks() -> Grid:
    row = {
        "online_s": 1.23,
        "link_s": 1.0,
        "rest_s": 0.23,
        "fastest_s": 1.2,
        "slowest_s": 1.5,
        "bytes": 23e6,
        "messages": 140,
        "latencies": 70,
    }
    facts = {"rounds": 5, "offline_s": 59.0, "load": 1.5, "cores": 2}
    return bench_table(facts | {"networks": dict.fromkeys(("none", "lan", "wan"), row)})


def summary() -> Summary:
    private = {"setup_s": 13.9, "online_s": 0.0287, "offline_s": 3.87, "bytes": 9_029_591, "messages": 65}
    side = FIGURES | {"prepared": private}
    head = {"model": "resnet18", "data": "cifar100", "seed": 0, "method": "osakd", "classifiers": [70.0, 71.0]}
    body = head | {"baseline": side, "reduced": side | {"accuracy": 70.0}, "teacher": FIGURES}
    return Summary.of(body, Path("summary.json"))


def counted() -> Grid:
    site = {"name": "features.denseblock4.denselayer16.relu2", "shape": (512, 32, 32), "relus": 524_288}
    sites = [site | {"stage": 4, "block": 16}]
    merging = {"folded": {"convs": 13, "macs": 10**8, "linear_macs": 51_200}}
    return inspect.count_table("package.module:Network", FIGURES | {"sites": sites, "merging": merging})


TABLES = {
    "designs": lambda: deepreduce.front_table(designs()),
    "cost": lambda: grid("resnet18", costs.HEAD, costs.table_rows(forecasts()), texts=(0, 1)),
    "plan": candidates,
    "sweep": groups,
    "live sweep": running,
    "exits": exits,
    "self-distill": classifiers,
    "anytime": anytime,
    "query": answers,
    "bench": measured_networks,
    "comparison": lambda: comparison_table(summary()),
    "distill": lambda: distill_table(summary()),
    "count": counted,
    "calibrate": lambda: pairs("machine", vars(Machine()) | {"file": "machine.json"}),
    "evaluate": lambda: pairs("runs/a", FIGURES | {"error_bound": 9.54e-7, "images": 10_000}),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_table_can_be_read_at_80_columns(name: str) -> None:
    table = TABLES[name]()
    check(table)
    lines = shown(table)
    assert "\u2500" in "".join(lines) or not any(table.head)  # a table, not a list of rows


def test_check_says_what_is_refused() -> None:
    refused = [{"node": "layer1.0.silu", "found": "silu", "need": "ReLU; train with --replace silu=relu"}]
    body = FIGURES | {"blocks": ["a"], "private": False, "online": None, "refused": refused}
    text = " ".join(shown(inspect.summary("net", body)))
    for part in ("557,056", "can run in private", "layer1.0.silu", "--replace"):
        assert part in text


# ---------------------------------------------------------------- numbers and words


def test_pairs_have_labels_units_and_separators() -> None:
    rows = dict(pairs("", FIGURES | {"relus": 41_670_000.0, "best_epoch": 600}).rows)
    assert rows["ReLUs"] == "41,670,000"
    assert rows["best epoch, counted from 0"] == "600"
    assert rows["test accuracy, %"] == "71.68"


def test_constants_of_a_machine_have_units() -> None:
    for name in vars(Machine()):
        assert LABELS[name][0].rpartition(", ")[2] in ("ms", "\u00b5s", "ns")


def test_no_heading_or_label_speaks_of_waits() -> None:
    heads = [word for make in TABLES.values() for word in make().head]
    assert not [text for text in (*heads, *(label for label, _ in LABELS.values())) if "wait" in text]
