"""The table of published networks: figures known from the papers, and what every row must have."""

from __future__ import annotations

import re

import pytest

from shoal.costs.protocols import delphi
from shoal.graph.counting import Cost, Row
from shoal.report.page import paper_columns
from shoal.report.published import CERTAINTY, Published, published

SOURCE = r".*, (Table \d|abstract|comparison table|section \d.\d)|result lists .*|README of .*"

KNOWN = [  # read off the papers' tables by hand
    ("DeepReDuce", "cifar100", "ResNet18", 28_670, 68.68, 0.74),
    ("DeepReDuce", "tiny-imagenet", "ResNet18", 12_290, 41.95, 0.455),
    ("DeepReDuce", "cifar100", "ResNet56", 147_500, 71.68, None),
    ("Shallow", "cifar100", "ResNet18", 21_100, 69.10, None),
    ("Shallow", "cifar100", "WRN22-8", 221_000, 79.62, None),
    ("SENet", "cifar100", "ResNet18", 49_600, 75.28, 1.13),
    ("SNL", "cifar100", "WRN22-8", 248_400, 77.7, None),
    ("DELPHI", "cifar100", "with quadratics", 300_000, 68.0, 6.5),
    ("SAFENet", "cifar100", "ResNet", None, 67.5, 7.2),
]


def test_published_rows_have_known_figures() -> None:
    rows = [(r.system, r.dataset, r.network, r.relus, r.accuracy, r.latency_s) for r in published()]
    assert [rows.count(row) for row in KNOWN] == [1] * len(KNOWN)


@pytest.mark.parametrize("row", published(), ids=lambda r: f"{r.system} {r.dataset} {r.relus}")
def test_published_row_is_sound(row: Published) -> None:
    assert row.dataset in ("cifar10", "cifar100", "tiny-imagenet", "imagenet")
    assert row.certainty in CERTAINTY
    assert 40 < row.accuracy < 97
    assert row.system
    assert re.fullmatch(SOURCE, row.source)
    if row.relus is None:
        assert row.macs or row.latency_s
        return
    assert 5_000 <= row.relus <= 2_300_000
    # A typing error would leave the line through DELPHI's latencies, from which printed ones are up to 40 % off.
    seconds = delphi(Cost((Row("", "relu", (), row.relus),), 0, 0, ())).seconds
    assert row.latency_s is None or 0.6 < seconds / row.latency_s < 2.2


FLOPS = [  # as printed; a multiply and an add are two
    ("SACT", "cifar10", 91.82, 82_393_168),
    ("SACT", "imagenet", 75.61, 1.1100941e10),
    ("BlockDrop", "cifar10", 93.6, 1.81e8),
    ("BlockDrop", "imagenet", 76.4, 1.25e10),
]


def test_published_multiply_adds_are_half_the_printed_flops() -> None:
    rows = [(r.system, r.dataset, r.accuracy, 2 * r.macs) for r in published() if r.macs is not None]
    assert rows == [(system, data, accuracy, pytest.approx(flops)) for system, data, accuracy, flops in FLOPS]


def test_costs_that_are_not_printed_are_empty_cells() -> None:
    rows = [row for row in published() if row.relus is None]
    assert {row.system for row in rows} == {"SACT", "BlockDrop", "SAFENet"}
    shown = {column.heading: [text for text, _ in column.cells] for column in paper_columns(rows)}
    assert shown["ReLUs"] == [""] * len(rows)
    assert shown["MACs"] == ["41,196,584", "5,550,470,500", "90,500,000", "6,250,000,000", ""]
    assert shown["DELPHI online, s"] == ["", "", "", "", "7.20"]


def test_published_rows_do_not_repeat() -> None:
    places = [(r.system, r.dataset, r.network, r.relus, r.source) for r in published()]
    assert len(set(places)) == len(places)
