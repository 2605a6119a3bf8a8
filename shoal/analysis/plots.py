"""Figures of the studies, drawn from their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
LABELS = {"accuracy": "accuracy, %", "loss": "cross-entropy", "images": "images"}


def _exit(number: Any) -> str:
    return f"exit {number + 1}" if isinstance(number, int) else f"{number} exits"


def _panels(width: float, height: float, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure  # imported here, because it loads slowly

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def lines(rows: Rows, x: str, columns: Sequence[str], label: str) -> Figure:
    """A panel for each of `columns` against `x`, with a line for each exit; None leaves a gap."""
    figure, panels = _panels(4.6 * len(columns), 3.6, 1, len(columns))
    for axes, column in zip(panels[0], columns, strict=True):
        for exit in dict.fromkeys(row["exit"] for row in rows):
            own = [row for row in rows if row["exit"] == exit]
            values = [np.nan if row[column] is None else row[column] for row in own]
            axes.plot([row[x] for row in own], values, marker="." if len(own) < 20 else "", label=_exit(exit))
        axes.set_xlabel(label)
        axes.set_ylabel(LABELS[column])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return figure


def by_layer(rows: Rows) -> Figure:
    """Gradient magnitudes of the layers in order, on a log scale, with a line for each exit; zeros leave gaps."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, panels = _panels(max(6.4, 0.3 * len(layers)), 4.6, 1, 1)
    axes = panels[0][0]
    for exit in dict.fromkeys(row["exit"] for row in rows):
        own = {row["layer"]: row["gradient"] for row in rows if row["exit"] == exit}
        axes.plot(range(len(layers)), [own[name] or np.nan for name in layers], marker=".", label=_exit(exit))
    axes.set_yscale("log")
    axes.set_ylabel("mean absolute gradient")
    names = [name.replace("$", r"\$") for name in layers]
    axes.set_xticks(range(len(layers)), names, rotation=60, ha="right", fontsize=7)
    axes.legend(frameon=False, fontsize=8)
    return figure


def bars(rows: Rows, x: str, y: str, label: str) -> Figure:
    """A bar for each row: `y` by `x`."""
    figure, panels = _panels(1.6 + 0.9 * len(rows), 3.4, 1, 1)
    axes = panels[0][0]
    axes.bar([_exit(row[x]) for row in rows], [row[y] for row in rows], color="#1f5fa8")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def stacked(rows: Rows, part: str, share: str, label: str) -> Figure:
    """One bar that is divided among the kinds of `part`, in proportion to the sum of `share` of each."""
    figure, panels = _panels(7.0, 1.9, 1, 1)
    axes, left = panels[0][0], 0.0
    for kind in dict.fromkeys(row[part] for row in rows):
        own = 100 * sum(row[share] for row in rows if row[part] == kind)
        axes.barh([0], [own], left=left, label=f"{kind}: {own:.1f} %")
        left += own
    axes.set_xlim(0, 100)
    axes.set_yticks([])
    axes.set_xlabel(label)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    return figure


def scatter(panels: Sequence[tuple[str, np.ndarray]], labels: np.ndarray, most: int = 10) -> Figure:
    """A panel for each (title, points [N, 2]), coloured by label; only the first `most` labels are shown."""
    figure, axes = _panels(3.2 * len(panels), 3.3, 1, len(panels))
    shown = np.isin(labels, np.unique(labels)[:most])
    for place, (title, points) in zip(axes[0], panels, strict=True):
        place.scatter(points[shown, 0], points[shown, 1], c=labels[shown], cmap="tab10", s=6)
        place.set_title(title, fontsize=9)
        place.set_xticks([])
        place.set_yticks([])
    return figure


def pictures(images: np.ndarray, maps: Mapping[str, np.ndarray]) -> Figure:
    """The images (uint8 [N, H, W, C]) in a row, and below them a row for each of `maps` ([N, h, w])."""
    figure, axes = _panels(1.3 * len(images) + 0.8, 1.3 * (1 + len(maps)), 1 + len(maps), len(images))
    for place, image in zip(axes[0], images, strict=True):
        grey = image.shape[-1] == 1
        place.imshow(image[..., 0] if grey else image[..., :3], cmap="gray" if grey else None)
    for row, (name, values) in zip(axes[1:], maps.items(), strict=True):
        row[0].set_ylabel(name.replace("$", r"\$"), fontsize=7)
        for place, value in zip(row, values, strict=True):
            place.imshow(value, cmap="inferno")
    for place in axes.flat:
        place.set_xticks([])
        place.set_yticks([])
    return figure
