"""Plots as PNG files: ReLUs by site, costs after reduction, training curves, the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.canvas import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, SKY, YELLOW, drawing, legend_below, plain
from shoal.errors import ShoalError
from shoal.pareto import front
from shoal.report.pareto import Point
from shoal.report.published import Published
from shoal.report.record import ROWS, Sample, look_up, sample
from shoal.storage.run import Run
from shoal.storage.summary import Summary
from shoal.surgery.sites import ReluSite
from shoal.units import count, percent, ratio

PAPER_MARKERS = "D^vPX"
PAPER_COLOURS = (ORANGE, GREEN, PURPLE, YELLOW, SKY, GREY)
NO_COSTS = ("accuracy", "prepared.max_abs_logit_error")
SPEED = {"lower": "faster", "higher": "slower"}
"""Rows of the comparison that are not costs of an inference."""


def plot_budget(sites: Sequence[ReluSite], counts: Mapping[str, int], replaced: Sequence[str], path: Path) -> None:
    """The percentage of ReLUs that each site keeps, and below it their numbers. Replaced blocks are marked."""
    kept = [0 if s.name in replaced else counts[s.name] for s in sites]
    with drawing(path, (max(8.0, 0.6 * len(sites) + 2), 7.0), rows=2, sharex=True) as (fractions, numbers):
        places = range(len(sites))
        parts = [100 * k / s.relus for k, s in zip(kept, sites, strict=True)]
        fractions.bar(places, parts, color=BLUE)
        for i, (site, part) in enumerate(zip(sites, parts, strict=True)):
            shown = "<1 %" if 0 < part < 0.5 else f"{part:.0f} %"
            text = "block\nreplaced" if site.name in replaced else shown
            fractions.annotate(text, (i, part), ha="center", va="bottom", fontsize=9)
        fractions.set_ylim(0, 112)
        fractions.set_yticks(range(0, 101, 25))
        fractions.set_ylabel("ReLUs kept, %")
        fractions.set_title(f"ReLUs kept: {count(sum(kept))} of {count(sum(s.relus for s in sites))}")
        numbers.bar(places, [s.relus for s in sites], color=PALE, label="all ReLUs")
        numbers.bar(places, kept, color=BLUE, label="kept")
        numbers.yaxis.set_major_formatter(lambda value, _: count(value))
        numbers.set_ylabel("number of ReLUs")
        numbers.set_xticks(list(places), [plain(s.name) for s in sites], rotation=40, ha="right")
        numbers.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
        for axes in (fractions, numbers):
            axes.grid(visible=False, axis="x")


@dataclass(frozen=True)
class _Cost:
    """One cost of both networks: label with unit, both values, their texts, and both samples, if any."""

    label: str
    old: float
    new: float
    shown: tuple[str, str]
    samples: tuple[Sample | None, Sample | None]

    @property
    def is_worse(self) -> bool:
        return self.new > self.old

    @property
    def verdict(self) -> str:
        """The ratio in words, such as "2.10x lower" or "1.56x slower"."""
        said = ratio(self.old, self.new) or "none left"
        factor, _, word = said.partition(" ")
        return f"{factor} {SPEED[word]}" if self.label.endswith(", s") and word in SPEED else said

    @property
    def queries(self) -> str:
        """The number of queries behind the medians, as text."""
        known = [s.count for s in self.samples if s is not None]
        return f"   n = {', '.join(map(str, dict.fromkeys(known)))}" if len(known) == 2 else ""


def plot_comparison(summary: Summary, path: Path) -> None:
    """Each cost of the reduced network in percent of the baseline's. Costs that rose have another colour.

    If the summary has the seconds of single queries, thin lines show the range from the fastest to the slowest query of
    each network, and ``n`` is the number of queries.
    """
    costs = _costs(summary)[::-1]
    with drawing(path, (11.0, 0.5 * len(costs) + 2.4)) as (axes,):
        for i, cost in enumerate(costs):
            _draw_cost(axes, i, cost)
        axes.axvline(100, color=INK, linewidth=1.5)
        axes.set_yticks(range(len(costs)), [cost.label for cost in costs])
        axes.set_xlim(0, max(110.0, *(105 * _reach(cost) for cost in costs)))
        axes.set_xlabel("reduced network, in % of the baseline (line at 100 %; lower is better)")
        start, end = (percent(summary.side(side)["accuracy"]) for side in ("baseline", "reduced"))
        axes.set_title(f"{plain(summary.data)}: costs after reduction; test accuracy {start} % before, {end} % after")
        axes.grid(visible=False, axis="y")
        _explain(axes, costs)
        legend_below(axes, columns=2)


def _costs(summary: Summary) -> list[_Cost]:
    found = []
    for key, label, show in ROWS:
        old, new = (look_up(summary.side(side), key) for side in ("baseline", "reduced"))
        if key not in NO_COSTS and old and new is not None:
            samples = sample(summary.side("baseline"), key), sample(summary.side("reduced"), key)
            found.append(_Cost(label, old, new, (show(old), show(new)), samples))
    return found


def _reach(cost: _Cost) -> float:
    """The right end of the row, as a multiple of the baseline."""
    return max(cost.new, *(s.slowest for s in cost.samples if s is not None), 0.0) / cost.old


def _draw_cost(axes: Any, place: int, cost: _Cost) -> None:
    share = 100 * cost.new / cost.old
    colour = ORANGE if cost.is_worse else BLUE
    axes.barh(place, share, height=0.62, color=colour)
    for drawn, height, shade in zip(cost.samples, (0.38, 0.0), (GREY, INK), strict=True):
        if drawn is not None:
            ends = [100 * drawn.fastest / cost.old, 100 * drawn.slowest / cost.old]
            axes.plot(ends, [place + height] * 2, "|-", color=shade, linewidth=1.4, markersize=8)
    texts = axes.get_yaxis_transform()
    words = f"{cost.verdict}:  {cost.shown[0]} before, {cost.shown[1]} after{cost.queries}"
    axes.text(1.01, place, words, transform=texts, va="center", fontsize=9.5, color=colour if cost.is_worse else INK)


def _explain(axes: Any, costs: Sequence[_Cost]) -> None:
    axes.barh(0, 0, color=BLUE, label="lower than before")
    if any(cost.is_worse for cost in costs):
        axes.barh(0, 0, color=ORANGE, label="higher, or slower, than before")
    if any(s is not None for cost in costs for s in cost.samples):
        axes.plot([], [], "|-", color=INK, label="fastest to slowest query, reduced")
        axes.plot([], [], "|-", color=GREY, label="the same, baseline")


def plot_curves(run: Run, path: Path) -> None:
    """Validation accuracy over the epochs of every stage of a run. Raises ShoalError when no epoch was logged."""
    rows = run.metrics()
    if not rows:
        raise ShoalError(f"found no metrics in {run.folder}; need a run that trained at least one epoch")
    with drawing(path, (9.0, 5.0)) as (axes,):
        for stage in dict.fromkeys(row["stage"] for row in rows):
            points = [(i, row["accuracy"]) for i, row in enumerate(rows, start=1) if row["stage"] == stage]
            axes.plot(*zip(*points, strict=True), marker=".", label=plain(stage))
        axes.set_xlabel("epochs of all stages, one after the other")
        axes.set_ylabel("validation accuracy, %")
        legend_below(axes, columns=4)


def plot_anytime(
    title: str, rows: Sequence[Mapping[str, Any]], budgeted: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """Test accuracy against multiply-adds: of each classifier, and of early exits at their average cost.

    `rows` are the result of `shoal.exits.anytime.anytime_rows`, `budgeted` that of its `budgeted`, as mappings.
    """
    with drawing(path, (8.5, 5.4)) as (axes,):
        points = [(row["macs"] / 1e6, row["accuracy"]) for row in rows]
        axes.plot(*zip(*points, strict=True), marker="o", color=BLUE, label="one classifier for all images")
        for row, point in zip(rows, points, strict=True):
            axes.annotate(plain(row["name"]), point, xytext=(6, -14), textcoords="offset points", fontsize=9)
        early = [(row["macs"] / 1e6, row["accuracy"]) for row in budgeted]
        if early:
            label = "images leave early, thresholds from validation"
            axes.plot(*zip(*sorted(early), strict=True), marker=".", color=ORANGE, label=label)
        axes.set_xlabel("average MACs per image, millions")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(plain(title))
        axes.margins(x=0.12, y=0.1)
        legend_below(axes, columns=2)


def plot_pareto(found: Sequence[Point], papers: Sequence[Published], path: Path) -> None:
    """Accuracy against ReLUs, with one panel per data set: our networks, their front, and the papers' points."""
    sets = sorted({point.data for point in found})
    with drawing(path, (11.0, 5.6 * len(sets)), rows=len(sets)) as panels:
        for axes, data in zip(panels, sets, strict=True):
            _plot_papers(axes, [row for row in papers if row.dataset == data and row.relus is not None])
            _plot_networks(axes, [point for point in found if point.data == data])
            axes.set_xscale("log")
            axes.set_xlabel("ReLUs (log scale)")
            axes.set_ylabel("test accuracy, %")
            axes.set_title(plain(data))
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=10, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _plot_papers(axes: Any, papers: Sequence[Published]) -> None:
    for i, system in enumerate(dict.fromkeys(row.system for row in papers)):
        rows = [(row.relus, row.accuracy) for row in papers if row.system == system]
        look = {"marker": PAPER_MARKERS[i % len(PAPER_MARKERS)], "color": PAPER_COLOURS[i % len(PAPER_COLOURS)]}
        axes.plot(*zip(*rows, strict=True), linestyle="none", alpha=0.7, label=f"{system} (published)", **look)


def _plot_networks(axes: Any, found: Sequence[Point]) -> None:
    """Networks with their spread, and the front as a step line. A log scale cannot show networks without ReLUs."""
    shown = [(point, cost) for point in found if (cost := point.costs["relus"])]
    best = [shown[i] for i in front([(cost, -point.accuracy) for point, cost in shown], ties=True)]
    line = [(cost, point.accuracy) for point, cost in best]
    if line:
        axes.step(*zip(*line, strict=True), where="post", color=BLUE, label="front of our networks")
    for side, marker, colour, label in (("baseline", "s", INK, "all ReLUs"), ("reduced", "o", BLUE, "reduced")):
        group = [(cost, point) for point, cost in shown if point.side == side]
        if group:
            _plot_side(axes, group, {"fmt": marker, "color": colour}, label)


def _plot_side(axes: Any, group: Sequence[tuple[float, Point]], look: dict[str, str], label: str) -> None:
    """Points with one standard deviation over seeds; the legend gives the number of seeds if there are several."""
    seeds = sorted({len(point.seeds) for _, point in group if point.spread is not None})
    if seeds:
        label += f": mean \u00b1 s.d. of {' or '.join(map(str, seeds))} seeds"
    x, y = [cost for cost, _ in group], [point.accuracy for _, point in group]
    spreads = [point.spread or 0.0 for _, point in group]
    axes.errorbar(x, y, yerr=spreads, capsize=4, markersize=8, label=label, **look)
