"""Tables and plots from run folders: baseline beside reduced beside ratio."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from shoal.checkpoint import replacing
from shoal.cost import count
from shoal.errors import ShoalError
from shoal.run import Run
from shoal.sites import Block, ReluSite, find_blocks

Summary = Mapping[str, Any]


def gated_macs(model: nn.Module, shape: tuple[int, ...], blocks: Sequence[str]) -> tuple[int, int]:
    """MACs of `model` with the named blocks replaced, by both accountings: (honest, the paper's).

    Honest: the block costs its one strided k x k convolution, and the shortcut stays. The paper's: the block keeps
    the cost of its second convolution and a projecting shortcut vanishes (relu_reduction.md 6.4).
    """
    total = count(model, shape)
    macs = {row.name: row.macs for row in total.rows}
    chosen = [b for b in find_blocks(model, shape) if b.name in blocks]
    honest = paper = total.macs
    for block in chosen:
        first, second = (macs[name] for name in block.convs)
        honest += _shallow_macs(total.rows, block) - first - second
        paper -= first + _shortcut_macs(model, shape, macs, block)
    return honest, paper


def _shallow_macs(rows: Sequence[Any], block: Block) -> int:
    shape = next(row.shape for row in rows if row.name == block.convs[1])
    return block.channels[0] * block.kernel**2 * shape[0] * shape[1] * shape[2]


def _shortcut_macs(model: nn.Module, shape: tuple[int, ...], macs: Mapping[str, int], block: Block) -> int:
    from shoal.surgery import module_calls, shapes

    traced = shapes(model, shape)
    calls = {node.name: node for node in traced.graph.nodes}
    if block.add is None:
        return 0
    others = [n for n in calls[block.add].all_input_nodes if n.name != block.result]
    node = others[0] if others else None
    names = {n: name for name, n in module_calls(traced).items()}
    while node is not None and node.name != block.source and len(node.all_input_nodes) == 1:
        if macs.get(names.get(node, ""), 0):
            return macs[names[node]]
        node = node.all_input_nodes[0]
    return 0


ROWS: tuple[tuple[str, str, str], ...] = (
    ("accuracy", "accuracy, %", "{:.2f}"),
    ("relus", "ReLUs", "{:,.0f}"),
    ("macs", "MACs", "{:,.0f}"),
    ("depth", "conv depth", "{:.0f}"),
    ("params", "parameters", "{:,.0f}"),
    ("private.setup_s", "direct: set-up, s", "{:.2f}"),
    ("private.online_s", "direct: an inference, s", "{:.3f}"),
    ("private.relu_s", "direct: of it ReLU, s", "{:.3f}"),
    ("private.linear_s", "direct: of it linear, s", "{:.3f}"),
    ("private.bytes", "direct: bytes an inference", "{:,.0f}"),
    ("private.messages", "direct: messages", "{:,.0f}"),
    ("prepared.offline_s", "prepared: offline an inference, s", "{:.3f}"),
    ("prepared.online_s", "prepared: online an inference, s", "{:.4f}"),
    ("prepared.bytes", "prepared: bytes online", "{:,}"),
    ("prepared.messages", "prepared: messages online", "{:,}"),
    ("private.max_abs_logit_error", "direct: largest logit error", "{:.5f}"),
)
"""(path in a summary's network, label, format)."""


def look_up(network: Summary, path: str) -> float | None:
    """A figure of one network by dotted path; None when it was not measured."""
    value: Any = network
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


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
    table = Table(title=f"{summary['model']} on {summary['data']}, seed {summary['seed']}", header_style="bold")
    for i, name in enumerate(("", "baseline", "reduced", "ratio")):
        table.add_column(name, justify="right" if i else "left")
    for row in comparison(summary):
        table.add_row(*row)
    macs = summary["reduced"].get("macs_accounting")
    if macs and macs["honest"] != macs["paper"]:
        table.caption = (
            f"MACs after gating, before cutting exits: {macs['honest']:,}; as the paper counts: {macs['paper']:,}"
        )
    return table


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    try:
        with replacing(path) as scratch:
            figure.savefig(scratch, dpi=150, format=path.suffix.removeprefix("."))
    finally:
        plt.close(figure)


def plot_budget(sites: Sequence[ReluSite], counts: Mapping[str, int], replaced: Sequence[str], path: Path) -> None:
    """Bars of ReLUs a site before and after, logarithmic; sites whose block was replaced are named so."""
    figure, axes = _axes(max(6.0, 0.55 * len(sites) + 2), 4.2)
    places = range(len(sites))
    axes.bar(places, [s.relus for s in sites], color="#c9d3df", label="all-ReLU network")
    kept = [0 if s.name in replaced else counts[s.name] for s in sites]
    axes.bar(places, kept, color="#1f5fa8", label="kept")
    for i, site in enumerate(sites):
        text = "block\nreplaced" if site.name in replaced else f"{kept[i] / site.relus:.0%}"
        axes.annotate(text, (i, site.relus), ha="center", va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_ylim(1, 4 * max(s.relus for s in sites))
    axes.set_ylabel("ReLUs (log scale)")
    axes.set_xticks(list(places), [s.name for s in sites], rotation=40, ha="right", fontsize=8)
    axes.set_title(f"ReLU budget a site: {sum(kept):,} of {sum(s.relus for s in sites):,}")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.32), ncols=2)
    _save(figure, path)


def plot_comparison(summary: Summary, path: Path) -> None:
    """Bars of each cost of the reduced network as a share of the baseline's."""
    wanted = [r for r in ROWS if r[0] not in ("accuracy", "private.max_abs_logit_error", "private.setup_s")]
    shown = []
    for key, label, form in wanted:
        old, new = (look_up(summary[side], key) for side in ("baseline", "reduced"))
        if old and new is not None:
            shown.append((label.strip(), new / old, form.format(old), form.format(new)))
    figure, axes = _axes(8.4, 0.42 * len(shown) + 1.6)
    shown.reverse()
    axes.barh([s[0] for s in shown], [1.0] * len(shown), color="#e6ebf1")
    axes.barh([s[0] for s in shown], [s[1] for s in shown], color="#1f5fa8")
    for i, (_, share, before, after) in enumerate(shown):
        axes.annotate(
            f"{share:.0%}   {before} to {after}",
            (max(1.0, share) + 0.02, i),
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
    axes.set_xlim(0, 1.65)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "baseline"])
    start, end = (summary[side]["accuracy"] for side in ("baseline", "reduced"))
    axes.set_title(f"{summary['data']}: cost after reduction; accuracy {start:.2f} % to {end:.2f} %")
    _save(figure, path)


def plot_curves(run: Run, path: Path) -> None:
    """Validation accuracy over the epochs of every stage of a run. Raises ShoalError when none is logged."""
    rows = run.metrics()
    if not rows:
        raise ShoalError(f"found no metrics in {run.folder}; need a run that trained at least one epoch")
    figure, axes = _axes(8.0, 3.8)
    for stage in dict.fromkeys(row["stage"] for row in rows):
        points = [(i, row["accuracy"]) for i, row in enumerate(rows) if row["stage"] == stage]
        axes.plot(*zip(*points, strict=True), marker=".", label=stage)
    axes.set_xlabel("epoch, all stages")
    axes.set_ylabel("validation accuracy, %")
    axes.legend(frameon=False)
    _save(figure, path)


def collect(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """One flat row of figures a run that has a summary. Raises ShoalError when none has, or on a foreign one."""
    rows = []
    for folder in folders:
        run = Run(folder)
        if run.has("summary.json"):
            summary = _summary(run)
            row: dict[str, Any] = {"run": str(folder), "data": summary["data"], "seed": summary["seed"]}
            for side in ("baseline", "reduced"):
                row |= {f"{side}.{key}": look_up(summary[side], key) for key, _, _ in ROWS}
            rows.append(row)
    if not rows:
        raise ShoalError(f"found no summary.json in {[str(f) for f in folders]}; need runs of reduce or demo")
    return rows


def _summary(run: Run) -> Summary:
    body = run.read_json("summary.json")
    kinds = {"data": str, "seed": int, "baseline": dict, "reduced": dict}
    if not isinstance(body, dict) or not all(isinstance(body.get(name), kind) for name, kind in kinds.items()):
        raise ShoalError(
            f"found no {', '.join(kinds)} in {run.folder / 'summary.json'}; need the file that shoal wrote; "
            "put it back or make the run again"
        )
    return body


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows with the same keys as CSV. Raises ShoalError when it cannot be written."""
    with replacing(path) as scratch, scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
