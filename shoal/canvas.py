"""Drawing of figures in one style. A file is written completely or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.storage.files import replacing

BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, GREY = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#56616c",
)  # fmt: skip
"""Okabe and Ito's colours, which colour-blind people can tell apart, and a grey."""
PALE, INK = "#d3dbe3", "#1b2229"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, GREY)
STYLE: Any = {
    "font.size": 11.0,
    "axes.titlesize": 12.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e3e8ed",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.0,
}


@contextmanager
def drawing(path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1, **more: Any) -> Iterator[list[Any]]:
    """Yield the axes, row by row, of a new figure; at the end of the block, write it to `path`.

    `size` is (width, height) in inches; `more` goes to matplotlib's `subplots`. The suffix of `path` is the format.
    """
    from matplotlib import rc_context  # imported here because it loads slowly
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, **more)
        for axes in grid.flat:
            axes.grid(visible=True)
            axes.set_prop_cycle(color=CYCLE)
        yield list(grid.flat)
        with replacing(path) as scratch:
            figure.savefig(scratch, dpi=150, format=path.suffix.removeprefix("."))


def plain(text: str) -> str:
    """`text` with dollar signs escaped, so that matplotlib does not read a name as a formula."""
    return text.replace("$", r"\$")


def legend_below(axes: Any, columns: int = 3) -> None:
    """Add the legend of `axes` below the whole figure, where it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)
