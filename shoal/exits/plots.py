"""Accuracy of exits against what they cost: dynamic inference beside every exit alone, and pruned networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.storage.files import replacing


def plot_exits(body: dict[str, Any], path: Path) -> None:
    """Draw what `early_exit.exits` returns as a PNG: test accuracy, thresholds by validation accuracy."""
    with _drawing(path) as axes:
        _draw_exits(axes, body)


def _draw_exits(axes: Any, body: dict[str, Any]) -> None:
    line = [(row["macs"] / 1e6, row["accuracy"]) for row in body["curve"]]
    if line:
        axes.plot(*zip(*line, strict=True), "-", color="#1f5fa8", label="dynamic, by thresholds")
    singles = [(row["macs"] / 1e6, row["accuracy"]) for row in body["exits"]]
    axes.plot(*zip(*singles, strict=True), "s--", color="#b5482f", label="one exit alone")
    chosen = body["test"]
    axes.plot([chosen["macs"] / 1e6], [chosen["accuracy"]], "*", markersize=13, color="#1b1f24", label="chosen")
    axes.set_xlabel("million multiply-adds an image, on average")
    axes.set_ylabel("test accuracy, %")


def plot_pruning(body: dict[str, Any], path: Path) -> None:
    """Draw what `prune_grid.prune_by_amounts` returns as a PNG: test accuracy of every exit against weights left.

    Where channels were cut, a second panel has each exit's own multiply-adds.
    """
    cut = body["method"] == "channels"
    with _drawing(path, panels=2 if cut else 1) as panels:
        axes, *more = panels if cut else [panels]
        _by_exit(axes, body, lambda row, exit: row["weights"] / 1e6)
        axes.set_xlabel("million weights that are not zero")
        axes.set_title(f"pruned: {body['method']}")
        for other in more:
            _by_exit(other, body, lambda row, exit: row["exit_macs"][exit] / 1e6)
            other.set_xlabel("million multiply-adds of the exit alone")


def _by_exit(axes: Any, body: dict[str, Any], at: Callable[[dict[str, Any], int], float]) -> None:
    for exit in range(len(body["rows"][0]["accuracy"])):
        points = [(at(row, exit), row["accuracy"][exit]) for row in body["rows"]]
        axes.plot(*zip(*points, strict=True), "o-", label=f"exit {exit + 1}")
    axes.set_ylabel("test accuracy, %")


@contextmanager
def _drawing(path: Path, panels: int = 1) -> Iterator[Any]:
    """The axes (or as many as there are panels) of a figure that is written to `path` as a PNG in the end."""
    from matplotlib.figure import Figure  # here, because it takes a while to load

    figure = Figure(figsize=(7.2 * panels, 4.4), layout="constrained")
    found = figure.subplots(1, panels)
    yield found
    for axes in found if panels > 1 else [found]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=150, format="png")
