"""What each command but those that train does, as functions that return JSON-ready data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from shoal.checkpoint import write_text
from shoal.cost import cost
from shoal.design_space import DesignSpace
from shoal.designs import parse
from shoal.errors import ShoalError
from shoal.figures import accountings, counts, figures
from shoal.models import CLOUDS
from shoal.private.cost_model import Machine
from shoal.report import Record, flat_row, plot_curves, plot_pareto, read, write_csv
from shoal.report.forecast import Online, check_network_name, flat_online, online
from shoal.report.page import Link, render
from shoal.report.pareto import points
from shoal.report.published import published
from shoal.run import Run, own_network
from shoal.sites import relu_sites
from shoal.spec import Spec, assemble
from shoal.surgery import trace
from shoal.train import Settings
from shoal.training import load_data


@dataclass(frozen=True)
class Asked:
    """Files that a report is to write, the network whose online seconds it forecasts, and a machine's constants."""

    csv: Path | None = None
    html: Path | None = None
    png: Path | None = None
    network: str | None = None
    machine: Path | None = None


def dump(body: Any) -> str:
    """JSON for `--json`."""
    return json.dumps(body, indent=1, default=str)


def parse_shape(text: str) -> tuple[int, int, int]:
    """(C, H, W) of text like 3x32x32. Raises ShoalError otherwise."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ShoalError(f"found --input {text!r}; need channels x height x width, such as 3x32x32")
    c, h, w = (int(p) for p in parts)
    return c, h, w


def input_shape(size: str | None, model: str) -> tuple[int, int, int]:
    """What `size` says, or without it 3x32x32, and 3x1024x1 for a point cloud network of the zoo."""
    return parse_shape(size or ("3x1024x1" if model in CLOUDS else "3x32x32"))


def count(
    model: str,
    size: str | None,
    classes: int,
    width: float,
    resolution: float,
    design: str | None = None,
    replaced: Sequence[str] = (),
) -> dict[str, Any]:
    """Counts of a zoo or a user's network, or of a DeepReDuce design of it, then with its linear runs merged."""
    shape = input_shape(size, model)
    spec = Spec(model, classes, shape, width, resolution, replaced=tuple(replaced))
    network, merging = own_network(spec), dict[str, Any]()
    if design is not None:
        network, merging = _designed(spec, network, design)
    total = cost(trace(network, shape))
    sites = [
        {"name": s.name, "shape": s.shape, "relus": s.relus, "stage": s.stage, "block": s.block}
        for s in relu_sites(network, shape)
    ]
    return counts(total) | {"unknown": total.unknown, "sites": sites} | merging


def _designed(spec: Spec, full: nn.Module, design: str) -> tuple[nn.Module, dict[str, Any]]:
    """The design's network, and its convolutions and MACs by all three accountings."""
    space = DesignSpace(spec, full)
    own = space.plan(parse(design, space.stages)).spec
    network, whole = (assemble(s, space.base(s)) for s in (own, replace(own, dropped=())))
    return network, {"merging": accountings(own, network, whole)}


def count_table(model: str, body: dict[str, Any]) -> Table:
    """Every ReLU site under the totals; below, a design's linear runs merged."""
    more = f", {body['comparisons']:,} comparisons of pools and ReLU6" if body["comparisons"] else ""
    head = f"{body['relus']:,} ReLUs{more}, {body['macs']:,} MACs, depth {body['depth']}, {body['params']:,} parameters"
    table = Table(title=escape(f"{model}: {head}"), header_style="bold")
    for i, name in enumerate(("ReLU site", "shape", "ReLUs", "stage", "block")):
        table.add_column(name, justify="right" if i else "left")
    for s in body["sites"]:
        table.add_row(s["name"], "x".join(map(str, s["shape"])), f"{s['relus']:,}", str(s["stage"]), str(s["block"]))
    rows = body.get("merging", {}).items()
    merged = [f"{k}: {r['convs']} convs, {r['macs']:,} MACs{_and_linear(r)}" for k, r in rows]
    table.caption = "\n".join(merged) or None
    return table


def _and_linear(row: dict[str, int]) -> str:
    return f" and {row['linear_macs']:,} of linear layers" if "linear_macs" in row else ""


def evaluate(folder: Path, data_dir: Path | None, fixed: bool) -> dict[str, Any]:
    """Test accuracy and counts of a run's network, in float and if asked in fixed point."""
    run = Run(folder)
    spec, network = run.load_model()
    data = load_data(run.config(), data_dir)
    body = figures(network, data, spec, Settings())
    if fixed:
        from shoal.private.deploy import clear_agreement, deploy

        graph, program, weights = deploy(network, data)
        images = data.normalise(data.test.images)
        agreement, accuracy = clear_agreement(graph, program, weights, images, data.test.labels)
        body |= {"fixed_accuracy": accuracy, "error_bound": program.error_bound} | asdict(agreement)
    return body


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
