"""Plots of accuracy against cost: early exits beside every exit alone, and pruned networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.canvas import BLUE, GREY, INK, ORANGE, drawing, legend_below
from shoal.exits.records import Chosen, PruneRow, Pruning


def plot_exits(body: Chosen, path: Path) -> None:
    """Draw the result of `shoal.jobs.exits.exits` as a PNG: test accuracy against average multiply-adds.

    The curve's thresholds were chosen by validation accuracy.
    """
    with drawing(path, (8.0, 5.4)) as (axes,):
        singles = [(row["macs"] / 1e6, row["accuracy"]) for row in body["exits"]]
        axes.plot(*zip(*singles, strict=True), "s--", color=ORANGE, label="one exit for all images")
        for i, place in enumerate(singles, start=1):
            axes.annotate(f"exit {i}", place, xytext=(7, -13), textcoords="offset points", fontsize=9)
        line = [(row["macs"] / 1e6, row["accuracy"]) for row in body["curve"]]
        if line:
            axes.plot(*zip(*line, strict=True), "-", color=BLUE, label="images leave early")
        chosen = body["test"]["macs"] / 1e6, body["test"]["accuracy"]
        axes.plot(*chosen, "*", markersize=15, color=INK, linestyle="none", label="chosen thresholds")
        if "baseline" in body:
            plain = body["baseline"]["macs"] / 1e6, body["baseline"]["accuracy"]
            axes.plot(*plain, "D", markersize=8, color=GREY, linestyle="none", label="plain network (baseline)")
        axes.set_xlabel("average MACs per image, millions")
        axes.set_ylabel("test accuracy, %")
        axes.margins(x=0.12, y=0.1)
        legend_below(axes)


def plot_pruning(body: Pruning, path: Path) -> None:
    """Draw the result of `shoal.jobs.prune.prune_by_amounts` as a PNG: test accuracy of each exit against weights.

    The weights are those that are not zero. If channels were cut, a second panel shows each exit's own multiply-adds.
    """
    cut = body["method"] == "channels"
    with drawing(path, (13.0 if cut else 8.0, 5.4), columns=2 if cut else 1) as (axes, *more):
        _by_exit(axes, body, lambda row, exit: row["weights"] / 1e6)
        axes.set_xlabel("weights that are not zero, millions")
        axes.set_title(f"pruned: {body['method']}")
        for other in more:
            _by_exit(other, body, lambda row, exit: row["exit_macs"][exit] / 1e6)
            other.set_xlabel("MACs of the exit alone, millions")
        legend_below(axes, columns=5)


def _by_exit(axes: Any, body: Pruning, at: Callable[[PruneRow, int], float]) -> None:
    for exit in range(len(body["rows"][0]["accuracy"])):
        points = [(at(row, exit), row["accuracy"][exit]) for row in body["rows"]]
        axes.plot(*zip(*points, strict=True), "o-", label=f"exit {exit + 1}")
    axes.set_ylabel("test accuracy, %")
