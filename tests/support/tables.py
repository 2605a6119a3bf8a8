"""Tables of parametrised tests of which `make check` runs a part: the rest is marked slow, and `make test` runs all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def fast_where(chosen: Callable[[Any], bool], rows: Iterable[Any]) -> list[Any]:
    """The rows, all but the chosen ones slow. A tuple is a row of several values."""
    return [row if chosen(row) else _slow(row) for row in rows]


def fast_first(rows: Iterable[Any]) -> list[Any]:
    """The rows, all but the first slow."""
    first, *rest = rows
    return [first, *map(_slow, rest)]


def _slow(row: Any) -> Any:
    values = row if isinstance(row, tuple) else (row,)
    return pytest.param(*values, marks=pytest.mark.slow)
