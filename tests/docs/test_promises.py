"""The table of promises in the threat model names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| ([^|]+) \| `(test_\w+)` \|$", re.MULTILINE)


def test_every_promise_of_the_threat_model_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "threat_model.md").read_text()
    rows = ROW.findall(text.partition("## Promises and their tests")[2].partition("\n## ")[0])
    defined = {
        node.name
        for path in (ROOT / "tests" / "private").rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert len(rows) > 20
    assert not {test for _, test in rows} - defined
    assert len({test for _, test in rows}) == len(rows)
