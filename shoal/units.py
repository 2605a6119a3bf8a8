"""Formatting of numbers for people: digits, thousands separators and units.

Units are in headings and labels, not in table cells: ``seconds(6.8)`` is "6.80" under the heading "online, s". 1 MB is
10^6 bytes. JSON output and files have plain numbers, without this formatting.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def significant(value: float, digits: int = 3) -> str:
    """`value` with at least `digits` significant digits, thousands separators and no exponent: "1,234", "0.0200"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    # Round first: with three digits, 9.999 is 10.0, not 10.00.
    exponent = int(f"{abs(value):.{digits - 1}e}".partition("e")[2])
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def count(value: float) -> str:
    """A number of things: "28,672". A number that is not whole, such as a mean, has one decimal."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def millions(value: float) -> str:
    """A number of things in millions, for narrow columns: "41.70" under the heading "MACs, millions"."""
    return significant(value / 1e6, 4)


def seconds(value: float) -> str:
    """Seconds: "36.6", "0.0456"."""
    return significant(value)


def milliseconds(value: float) -> str:
    """A time in seconds, shown in milliseconds: "45.6" for 0.0456."""
    return significant(1e3 * value)


def megabytes(value: float) -> str:
    """A number of bytes, shown in MB (10^6 bytes): "9.03"."""
    return significant(value / 1e6)


def percent(value: float) -> str:
    """A value in percent, such as an accuracy: "71.68"."""
    return f"{value:.2f}"


def share(fraction: float) -> str:
    """A fraction, shown in percent with its unit: "12.5 %" for 0.125."""
    return f"{100 * fraction:.1f} %"


def points(difference: float) -> str:
    """A difference of two accuracies in percentage points, with its sign: "-0.19"."""
    return f"{difference:+.2f}"


def probability(value: float) -> str:
    """A probability or an error, which may be tiny: "9.54e-07", "0.0012"."""
    return f"{value:.3g}"


def spread(mean: float, deviation: float, show: Callable[[float], str]) -> str:
    """A mean, formatted by `show`, and its standard deviation with as many decimals: "71.68 \u00b1 0.30"."""
    shown = show(mean)
    return f"{shown} \u00b1 {deviation:,.{len(shown.partition('.')[2])}f}"


def ratio(before: float, after: float) -> str:
    """The change of a cost as a factor: "11.27x lower", "1.56x higher" or "same"; empty if one of both is 0."""
    if not before or not after:
        return ""
    shown = f"{max(before, after) / min(before, after):.2f}x"
    if shown == "1.00x":
        return "same"
    return f"{shown} {'lower' if after < before else 'higher'}"


def duration(value: float) -> str:
    """A time in seconds, rounded and with units: "8 s", "4 min 10 s", "2 h 5 min"."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
