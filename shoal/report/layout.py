"""Tables on a terminal. Headings wrap and numbers do not; a table that is too wide is printed as lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from shoal.report.labels import labelled

LEAST_TEXT = 14
"""Minimum width of a column of texts, unless its longest text is shorter."""
GAP = 2


@dataclass
class Grid:
    """A table with a title above and a caption below, at most as wide as the terminal.

    Columns at the indices `texts` are left-aligned and may wrap; with `shorten`, they lose their beginnings instead.
    All other columns hold numbers, which are right-aligned and never wrap. If even the narrowest columns do not fit,
    each row is printed as a list of ``heading value``.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: tuple[int, ...] = (0,)
    shorten: bool = False
    caption: str = ""
    gap: int = field(default=GAP, repr=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield title, table or list, and caption for the width in `options`."""
        if self.title:
            yield Text(self.title, style="bold")
        widths = self._widths(options.max_width)
        yield self._list(options.max_width) if widths is None else self._table(widths)
        if self.caption:
            yield Text(self.caption, style="dim")

    def _widths(self, width: int) -> list[int] | None:
        """The width of every column, or None if they do not fit."""
        cells = [max((cell_len(row[i]) for row in self.rows), default=0) for i in range(len(self.head))]
        words = [max(map(cell_len, name.split()), default=0) for name in self.head]
        least = [min(c, LEAST_TEXT) if i in self.texts else c for i, c in enumerate(cells)]
        found = [max(c, w, 1) for c, w in zip(least, words, strict=True)]
        left = width - sum(found) - self.gap * (len(found) - 1)
        if left < 0:
            return None
        for wanted in (cells, list(map(cell_len, self.head))):  # texts first, then headings on one line
            for i, want in enumerate(wanted):
                more = min(left, max(0, want - found[i]))
                found[i], left = found[i] + more, left - more
        return found

    def _table(self, widths: Sequence[int]) -> Table:
        # The box adds one space of the gap, the padding the rest.
        table = Table(
            box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, self.gap - 1, 0, 0), header_style="bold"
        )
        table.show_header = any(self.head)
        for i, (name, width) in enumerate(zip(self.head, widths, strict=True)):
            justify = self._justify(i)
            table.add_column(Text(name), justify=justify, width=width, overflow="fold", vertical="top")
        columns = [self._fitted(i, [row[i] for row in self.rows], width) for i, width in enumerate(widths)]
        for cells in zip(*columns, strict=True):
            table.add_row(*map(Text, cells))
        return table

    def _justify(self, i: int) -> Any:
        return "left" if i in self.texts else "right"

    def _fitted(self, i: int, cells: Sequence[str], width: int) -> Sequence[str]:
        return shortened(cells, width) if self.shorten and i in self.texts else cells

    def _list(self, width: int) -> Table:
        table = Table.grid(padding=(0, self.gap, 0, 0))
        longest = max((cell_len(row[i]) for row in self.rows for i in range(1, len(row))), default=1)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold", min_width=min(longest, width // 2))
        for row in self.rows:
            table.add_row(Text(row[0], style="bold"), "")
            for name, cell in zip(self.head[1:], row[1:], strict=True):
                table.add_row(Text(f"  {name}"), Text(cell))
        return table


def shortened(cells: Sequence[str], width: int) -> Sequence[str]:
    """Shorten names to `width` cells: remove the ending that all share, then the beginning of each.

    All names are returned unchanged, to be wrapped, if two of them would become equal.
    """
    if all(cell_len(cell) <= width for cell in cells):
        return cells
    ending = _shared_ending(cells)
    bare = [cell.removesuffix(ending) + "\u2026" if ending else cell for cell in cells]
    short = [from_the_left(cell, width) for cell in bare]
    return short if len(set(short)) == len(set(cells)) else cells


def _shared_ending(cells: Sequence[str]) -> str:
    """The ending that all cells share, from a separator on; empty if all cells are equal."""
    if len(set(cells)) < 2:
        return ""
    least, most = min(c[::-1] for c in cells), max(c[::-1] for c in cells)
    same = [a == b for a, b in zip(least, most, strict=False)]
    shared = least[: same.index(False) if False in same else len(same)][::-1]
    starts = [i for i, letter in enumerate(shared) if letter in "/-_. "]
    return shared[starts[0] :] if starts else ""


def from_the_left(text: str, width: int) -> str:
    """`text` in at most `width` cells; a longer text loses its beginning, because the end of a path tells it apart."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) > width - 1:
        text = text[1:]
    return "\u2026" + text


def distinct(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share. A single path keeps its last component."""
    parts = [PurePath(path).parts for path in paths]
    if not all(parts):
        return list(paths)
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [str(PurePath(*p[shared:])) for p in parts]


def grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], **more: Any) -> Grid:
    """A table whose first column holds texts and all others numbers, unless `more` (see `Grid`) says otherwise."""
    return Grid(title, head, rows, **more)


def pairs(title: str, body: Mapping[str, Any]) -> Grid:
    """Plain values of `body`, one row each, with a label and unit. Lists and dictionaries are left out."""
    rows = [labelled(key, value) for key, value in body.items() if not isinstance(value, (dict, list, tuple))]
    return Grid(title, ["", ""], rows, texts=(0, 1))
