"""The sizes that keep the code readable, with the exceptions and their reasons."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_LINES, MOST_BODY, MOST_PARAMETERS, MOST_FILES = 350, 40, 6, 15

LARGE = {"shoal/cli": "a file a command", "shoal/jobs": "a file a command"}
"""Folders of more than `MOST_FILES` modules, each with its reason."""

WIDE = {
    ("shoal/training/loop.py", "fit"): "public, and each of its options is given by keyword",
    ("shoal/data/loading.py", "load"): "public, and each of its options is given by keyword",
}
"""Functions of more than six parameters outside of `cli`, each with its reason."""


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sorted((ROOT / "shoal").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield path.relative_to(ROOT), node


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return len([argument for argument in given if argument.arg not in ("self", "cls")])


def test_no_file_is_long() -> None:
    files = [path for name in ("shoal", "tests", "benchmarks", "examples") for path in (ROOT / name).rglob("*.py")]
    assert not [str(path) for path in files if path.read_text().count("\n") > MOST_LINES]


def test_no_function_is_long() -> None:
    assert not [(str(p), f.name) for p, f in functions() if int(f.end_lineno or 0) - f.lineno >= MOST_BODY]


def test_no_function_takes_many_parameters_but_those_with_a_reason() -> None:
    wide = {(str(p), f.name) for p, f in functions() if parameters(f) > MOST_PARAMETERS and p.parts[1] != "cli"}
    assert wide == set(WIDE)
    assert len(WIDE) <= 8


def test_no_folder_is_crowded() -> None:
    folders = [path for path in (ROOT / "shoal").rglob("*") if path.is_dir()]
    modules = {str(p.relative_to(ROOT)): len({*p.glob("*.py")} - {p / "__init__.py"}) for p in folders}
    assert {name for name, count in modules.items() if count > MOST_FILES} == set(LARGE)


def test_no_package_has_the_name_of_a_public_function() -> None:
    import shoal

    folders = {p.name for p in (ROOT / "shoal").rglob("*") if p.is_dir()}
    assert not folders & {name for name in shoal.__all__ if name.islower()}
