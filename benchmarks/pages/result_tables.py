"""Result files, and Markdown: tables, and paragraphs of limited width."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WIDTH = 118
Rows = list[tuple[str, ...]]


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def table(head: tuple[str, ...], rows: Rows) -> str:
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines)


def wrapped(text: str) -> str:
    """The text with every paragraph and list item in lines of `WIDTH` columns; tables and code stay as they are.

    A line is never broken within inline code, so that a command can be copied.
    """
    return "\n\n".join(_block(block) for block in text.split("\n\n"))


def _block(block: str) -> str:
    if block.startswith(("|", "```")):
        return block
    if block.startswith("- "):
        return "\n".join(_filled(item, "  ") for item in re.split(r"\n(?=- )", block))
    return _filled(block, "")


def _filled(text: str, indent: str) -> str:
    joined = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), " ".join(text.split()))
    lines = textwrap.wrap(joined, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")
