"""`import shoal` as a contents page: every public name is there, and the old import paths still work."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import shoal
from shoal.moved import MOVED

ROOT = Path(__file__).parents[1]
OLD = [(module, name) for module, names in MOVED.items() for name in names]


@pytest.mark.parametrize("module", shoal.PLACES)
def test_every_public_name_is_what_its_module_defines(module: str) -> None:
    for name in shoal.PLACES[module]:
        assert getattr(shoal, name) is getattr(importlib.import_module(module), name)


def test_the_contents_are_complete() -> None:
    assert set(shoal.__all__) <= set(dir(shoal))
    assert {"deploy", "save_artifact", "Client", "Server", "TLS", "StoppedError", "__version__"} <= set(shoal.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = shoal.nothing  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "shoal" / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    found = {(str(node.module), alias.asname) for node in imports for alias in node.names}
    own = {("shoal.errors", name) for name in ("ShoalError", "ShoalWarning", "StoppedError")}
    assert found == {(module, name) for module, names in shoal.PLACES.items() for name in names} | own
    assert (ROOT / "shoal" / "py.typed").exists()


@pytest.mark.parametrize(("module", "name"), OLD)
def test_an_old_path_gives_the_same_object_and_says_where_it_is_now(module: str, name: str) -> None:
    place = MOVED[module][name]
    old = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{module}.{name} is now {place}.{name}"):
        found = getattr(old, name)
    assert found is getattr(importlib.import_module(place), name)


@pytest.mark.parametrize(("module", "name"), [pair for pair in OLD if pair[0] == f"shoal.{pair[1]}"])
def test_a_function_stays_public_when_its_old_module_of_the_same_name_is_imported(module: str, name: str) -> None:
    assert name in shoal.__all__
    code = f"import shoal, {module} as old; print(shoal.{name}.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == MOVED[module][name]


def test_names_that_never_were_are_not_found_at_old_paths() -> None:
    with pytest.raises(AttributeError):
        _ = importlib.import_module("shoal.branch").nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("shoal.nothing")


def test_the_library_itself_uses_no_old_path() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for path in (ROOT / "shoal").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module in MOVED:
                    assert not {alias.name for alias in node.names} & set(MOVED[str(node.module)]), path
