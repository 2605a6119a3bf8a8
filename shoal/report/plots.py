"""Plots as files: budget by site, costs after reduction, training curves, the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.pareto import front
from shoal.report.pareto import Point
from shoal.report.published import Published
from shoal.report.record import ROWS, Summary, look_up
from shoal.storage.files import replacing
from shoal.storage.run import Run
from shoal.surgery.sites import ReluSite

PAPER_MARKERS = "D^vPX"
PAPER_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#56616c")
"""Okabe and Ito's colours, which colour-blind people tell apart, and grey."""


def _axes(width: float, height: float) -> tuple[Any, Any]:
    figure, panels = _panels(width, height, 1)
    return figure, panels[0]


def _panels(width: float, height: float, count: int) -> tuple[Any, list[Any]]:
    """A figure of `count` panels, one below the other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(count, figsize=(width, height), layout="constrained", squeeze=False)
    for axes in grid[:, 0]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid[:, 0])


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
    axes.set_xticks(list(places), [_plain(s.name) for s in sites], rotation=40, ha="right", fontsize=8)
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
    axes.set_title(f"{_plain(summary['data'])}: cost after reduction; accuracy {start:.2f} % to {end:.2f} %")
    _save(figure, path)


def _plain(text: str) -> str:
    """A name that is no formula: names of folders and stages may hold dollar signs."""
    return text.replace("$", r"\$")


def plot_curves(run: Run, path: Path) -> None:
    """Validation accuracy over the epochs of every stage of a run. Raises ShoalError when none is logged."""
    rows = run.metrics()
    if not rows:
        raise ShoalError(f"found no metrics in {run.folder}; need a run that trained at least one epoch")
    figure, axes = _axes(8.0, 3.8)
    for stage in dict.fromkeys(row["stage"] for row in rows):
        points = [(i, row["accuracy"]) for i, row in enumerate(rows) if row["stage"] == stage]
        axes.plot(*zip(*points, strict=True), marker=".", label=_plain(stage))
    axes.set_xlabel("epoch, all stages")
    axes.set_ylabel("validation accuracy, %")
    axes.legend(frameon=False)
    _save(figure, path)


def plot_anytime(
    title: str, rows: Sequence[Mapping[str, Any]], budgeted: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """Test accuracy against multiply-adds: of each classifier, and of early exits by the average that they took.

    `rows` are those of `shoal.exits.anytime.anytime_rows` and `budgeted` those of its `budgeted`, as mappings.
    """
    figure, axes = _axes(7.6, 4.4)
    points = [(row["macs"] / 1e6, row["accuracy"]) for row in rows]
    axes.plot(*zip(*points, strict=True), marker="o", color="#1f5fa8", label="one classifier for all images")
    for row, point in zip(rows, points, strict=True):
        axes.annotate(_plain(row["name"]), point, xytext=(4, -11), textcoords="offset points", fontsize=8)
    early = [(row["macs"] / 1e6, row["accuracy"]) for row in budgeted]
    if early:
        axes.plot(*zip(*sorted(early), strict=True), marker=".", color="#d55e00", label="thresholds from validation")
    axes.set_xlabel("million multiply-adds an image")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(_plain(title))
    axes.legend(frameon=False)
    _save(figure, path)


def plot_pareto(found: Sequence[Point], papers: Sequence[Published], path: Path) -> None:
    """Accuracy against ReLUs, a panel for each data set: networks, their front, and the papers' points of that set."""
    sets = sorted({point.data for point in found})
    figure, panels = _panels(8.4, 4.8 * len(sets), len(sets))
    for axes, data in zip(panels, sets, strict=True):
        _plot_papers(axes, [row for row in papers if row.dataset == data])
        _plot_networks(axes, [point for point in found if point.data == data])
        axes.set_xscale("log")
        axes.set_xlabel("ReLUs (log scale)")
        axes.set_ylabel("accuracy, %")
        axes.set_title(_plain(data))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def _plot_papers(axes: Any, papers: Sequence[Published]) -> None:
    for i, system in enumerate(dict.fromkeys(row.system for row in papers)):
        rows = [(row.relus, row.accuracy) for row in papers if row.system == system]
        look = {"marker": PAPER_MARKERS[i % len(PAPER_MARKERS)], "color": PAPER_COLOURS[i % len(PAPER_COLOURS)]}
        axes.plot(*zip(*rows, strict=True), linestyle="none", markersize=5, alpha=0.7, label=system, **look)


def _plot_networks(axes: Any, found: Sequence[Point]) -> None:
    """Networks with their spread and the step line of the front; those without ReLUs have no place on a log scale."""
    shown = [(point, cost) for point in found if (cost := point.costs["relus"])]
    best = [shown[i] for i in front([(cost, -point.accuracy) for point, cost in shown], ties=True)]
    line = [(cost, point.accuracy) for point, cost in best]
    if line:
        axes.step(*zip(*line, strict=True), where="post", color="#0072b2", label="front")
    for side, marker, colour, label in (
        ("baseline", "s", "#3d4650", "all ReLUs"),
        ("reduced", "o", "#0072b2", "reduced"),
    ):
        group = [(cost, point.accuracy, point.spread or 0.0) for point, cost in shown if point.side == side]
        if group:
            x, y, spread = zip(*group, strict=True)
            axes.errorbar(x, y, yerr=spread, fmt=marker, color=colour, capsize=3, label=label)
