"""Numbers as people read them: the only place that decides digits, separators and units.

Units stand in headings and labels, not in cells: ``seconds(6.8)`` is "6.80" below a heading "online, s". MB is 10^6
bytes. JSON output and files hold plain numbers and do not pass through here.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def significant(value: float, digits: int = 3) -> str:
    """`value` with at least `digits` significant digits, thousands separators and no exponent: "1,234", "0.0200"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    # Rounding comes first: 9.999 is 10.0 with three digits, not 10.00.
    exponent = int(f"{abs(value):.{digits - 1}e}".partition("e")[2])
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def count(value: float) -> str:
    """A number of things: "28,672"; a mean that is no whole number has one decimal."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def millions(value: float) -> str:
    """A number of things in millions, for narrow columns: "41.70" below "MACs, millions"."""
    return significant(value / 1e6, 4)


def seconds(value: float) -> str:
    """Seconds: "36.6", "0.0456"."""
    return significant(value)


def milliseconds(value: float) -> str:
    """Seconds as milliseconds: "45.6" for 0.0456."""
    return significant(1e3 * value)


def megabytes(value: float) -> str:
    """Bytes as MB (10^6 bytes): "9.03"."""
    return significant(value / 1e6)


def percent(value: float) -> str:
    """A value in percent, such as an accuracy: "71.68"."""
    return f"{value:.2f}"


def share(fraction: float) -> str:
    """A fraction in percent, with its unit: "12.5 %"."""
    return f"{100 * fraction:.1f} %"


def points(difference: float) -> str:
    """A difference of two accuracies in percentage points, with its sign: "-0.19"."""
    return f"{difference:+.2f}"


def probability(value: float) -> str:
    """A chance or an error, which may be tiny: "9.54e-07", "0.0012"."""
    return f"{value:.3g}"


def spread(mean: float, deviation: float, show: Callable[[float], str]) -> str:
    """A mean as `show` shows it and its standard deviation with as many decimals: "71.68 \u00b1 0.30"."""
    shown = show(mean)
    return f"{shown} \u00b1 {deviation:,.{len(shown.partition('.')[2])}f}"


def ratio(before: float, after: float) -> str:
    """How much less or more a cost is than before: "11.27x less", "1.56x more", "same"; empty where one is 0."""
    if not before or not after:
        return ""
    shown = f"{max(before, after) / min(before, after):.2f}x"
    if shown == "1.00x":
        return "same"
    return f"{shown} {'less' if after < before else 'more'}"


def duration(value: float) -> str:
    """A time to wait, with its unit: "8 s", "4 min 10 s", "2 h 5 min"."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
