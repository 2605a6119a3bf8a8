"""Numbers as people read them: separators, digits, and ratios that say which way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import units


@pytest.mark.parametrize(
    ("show", "value", "shown"),
    [
        (units.count, 28672, "28,672"),
        (units.count, 600.0, "600"),
        (units.count, 600.5, "600.5"),
        (units.millions, 41_700_000, "41.70"),
        (units.millions, 1_234_567_890, "1,235"),
        (units.seconds, 36.6, "36.6"),
        (units.seconds, 0.02, "0.0200"),
        (units.seconds, 9.999, "10.0"),
        (units.seconds, 0.0, "0"),
        (units.seconds, 4321.0, "4,321"),
        (units.milliseconds, 0.0456, "45.6"),
        (units.megabytes, 9_029_591, "9.03"),
        (units.percent, 71.678, "71.68"),
        (units.share, 0.125, "12.5 %"),
        (units.points, -0.19, "-0.19"),
        (units.duration, 59.4, "59 s"),
        (units.duration, 250, "4 min 10 s"),
        (units.duration, 7500, "2 h 5 min"),
    ],
)
def test_numbers_are_shown_one_way(show: object, value: float, shown: str) -> None:
    assert callable(show)
    assert show(value) == shown


def test_a_ratio_says_less_or_more() -> None:
    assert units.ratio(22.53, 1) == "22.53x lower"
    assert units.ratio(1, 1.56) == "1.56x higher"
    assert units.ratio(5, 5) == "same"
    assert units.ratio(5, 0) == ""


def test_a_deviation_has_the_decimals_of_its_mean() -> None:
    assert units.spread(71.678, 0.3, units.percent) == "71.68 \u00b1 0.30"
    assert units.spread(600.0, 12.4, units.count) == "600 \u00b1 12"
    assert units.spread(0.04561, 0.0012, units.seconds) == "0.0456 \u00b1 0.0012"


@given(st.floats(1e-9, 1e12))
def test_no_exponent_and_the_value_to_three_digits(value: float) -> None:
    shown = units.significant(value)
    assert "e" not in shown
    assert float(shown.replace(",", "")) == pytest.approx(value, rel=0.5e-2)
