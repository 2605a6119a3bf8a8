"""Plots: what became slower is marked as slower, with queries and spread; fractions are drawn as fractions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from shoal.canvas import BLUE, ORANGE
from shoal.report import plot_budget, plot_comparison
from shoal.report.record import Sample, sample
from shoal.storage.summary import Summary


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written while the test runs."""
    found: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **named: Any) -> None:
        found.append(figure)
        save(figure, *args, **named)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def summary(factor: float) -> dict[str, Any]:
    """A network and one whose online phase takes `factor` of its time, with a quarter of its ReLUs."""
    times = [0.5, 0.25, 0.375]
    old = {"accuracy": 98.0, "relus": 1000, "macs": 4000, "prepared": {"online_s": 0.375, "samples_s": times}}
    online = {"online_s": 0.375 * factor, "samples_s": [factor * t for t in times]}
    new = old | {"accuracy": 97.0, "relus": 250, "prepared": online}
    return {"data": "digits", "model": "resnet10", "seed": 0, "baseline": old, "reduced": new}


def texts(figure: Figure) -> list[str]:
    (axes,) = figure.axes
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(("factor", "word"), [(1.5, "1.50x slower"), (0.5, "2.00x faster")])
def test_what_became_slower_is_marked_so(factor: float, word: str, drawn: list[Figure], tmp_path: Path) -> None:
    plot_comparison(Summary.of(summary(factor), tmp_path), tmp_path / "comparison.png")
    (axes,) = drawn[0].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    place = labels.index("private: online, a query, s")
    bars = {round(bar.get_y() + bar.get_height() / 2): bar for bar in axes.patches if bar.get_width()}  # type: ignore[attr-defined]
    assert bars[place].get_width() == pytest.approx(100 * factor)  # type: ignore[attr-defined]
    assert to_hex(bars[place].get_facecolor()) == (ORANGE if factor > 1 else BLUE)
    assert to_hex(bars[labels.index("ReLUs")].get_facecolor()) == BLUE
    (shown,) = [text for text in texts(drawn[0]) if word in text]
    assert "n = 3" in shown
    assert axes.get_xlim()[1] > 100 * factor


def test_spread_reaches_from_the_fastest_to_the_slowest_query(drawn: list[Figure], tmp_path: Path) -> None:
    plot_comparison(Summary.of(summary(1.5), tmp_path), tmp_path / "comparison.png")
    lines = [list(map(float, line.get_xdata())) for line in drawn[0].axes[0].lines]
    assert pytest.approx([100, 200]) in lines  # 1.5 x 0.25 and 1.5 x 0.5, of 0.375
    assert pytest.approx([100 * 0.25 / 0.375, 100 * 0.5 / 0.375]) in lines


def test_no_sample_of_what_was_not_stored() -> None:
    body = summary(1.5)["reduced"]
    assert sample(body, "prepared.online_s") == Sample(3, 0.375, 0.75)
    assert sample(body, "private.online_s") is None
    assert sample(body, "relus") is None
    assert sample({"prepared": {"samples_s": ["x"]}}, "prepared.online_s") is None


def test_a_budget_s_bars_are_as_high_as_the_fractions(drawn: list[Figure], tmp_path: Path) -> None:
    sites: Any = [SimpleNamespace(name=name, relus=size) for name, size in (("a", 1000), ("b", 500), ("c", 100))]
    plot_budget(sites, {"a": 130, "b": 1, "c": 50}, ["c"], tmp_path / "budget.png")
    fractions, numbers = drawn[0].axes
    assert (fractions.get_yscale(), numbers.get_yscale()) == ("linear", "linear")
    assert [bar.get_height() for bar in fractions.patches] == pytest.approx([13, 0.2, 0])  # type: ignore[attr-defined]
    assert [text.get_text() for text in fractions.texts] == ["13 %", "<1 %", "block\nreplaced"]
