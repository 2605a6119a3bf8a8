"""Who may import whom: the levels of docs/architecture.md, with no circle and no arrow back."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEVELS = (
    ("errors", "moved", "pareto", "units"),
    ("outputs", "progress", "__init__"),
    ("data",),
    ("storage",),
    ("canvas", "conversion", "graph"),
    ("surgery",),
    ("models", "training"),
    ("private.monitoring", "private.transport"),
    ("private.program",),
    ("private.products", "private.protocol"),
    ("private.compiler", "private.engine"),
    ("private.serving",),
    ("distillation",),
    ("reduction",),
    ("channels",),
    ("exits",),
    ("networks",),
    ("analysis", "costs"),
    ("recipes",),
    ("report",),
    ("measuring",),
    ("sweep",),
    ("jobs",),
    ("cli",),
    ("__main__",),
)
"""A package may import itself and those of earlier levels; packages of one level do not import each other."""


ROOMS = {name.split(".")[0] for names in LEVELS for name in names}


def room(module: str) -> str:
    """The package of `LEVELS` that `module` (without ``shoal.``) is in."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "private" and len(parts) > 1 else parts[0]


def arrows() -> Iterator[tuple[str, str, str]]:
    """(module, its room, room that it imports), of every import in the package, those within functions, too."""
    for path in sorted((ROOT / "shoal").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "shoal").with_suffix("").parts)
        own = room(module.removesuffix(".__init__"))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "shoal":
                yield from (
                    (module, own, room(alias.name) if alias.name in ROOMS else "__init__") for alias in node.names
                )
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("shoal."):
                yield module, own, room(str(node.module).removeprefix("shoal."))


def test_imports_go_one_way() -> None:
    level, bad = {name: i for i, names in enumerate(LEVELS) for name in names}, []
    for module, own, other in arrows():
        if own != other and own != "private" and level[other] >= level[own]:
            bad.append(f"{module} imports {other}")
    assert not bad


def test_every_package_has_a_level() -> None:
    folders = {p.name for p in (ROOT / "shoal").iterdir() if p.is_dir() and list(p.glob("*.py"))} - {"private"}
    folders |= {f"private.{p.name}" for p in (ROOT / "shoal" / "private").iterdir() if list(p.glob("*.py"))}
    files = {p.stem for p in (ROOT / "shoal").glob("*.py")}
    assert folders | files == {name for names in LEVELS for name in names}


def test_no_module_imports_a_private_name_of_another() -> None:
    for path in (ROOT / "shoal").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("shoal"):
                assert not [a.name for a in node.names if a.name.startswith("_") and a.name != "__version__"], path


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("shoal", ("torch", "numpy", "shoal.training")),
        ("shoal.private.serving.client", ("shoal.training", "shoal.recipes", "shoal.exits", "spu", "jax")),
        ("shoal.private.serving.server", ("shoal.training", "shoal.recipes", "shoal.exits", "spu", "jax")),
        ("shoal.private.engine.worker", ("shoal.training", "shoal.recipes", "shoal.exits", "spu", "jax")),
    ],
)
def test_what_an_import_leaves_out(imported: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {imported}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_help_needs_no_torch() -> None:
    blocked = "import sys; sys.modules['torch'] = None; sys.argv = ['shoal', '--help']"
    code = f"{blocked}; from shoal.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "Deploy and serve" in done.stdout


def imported_modules(path: Path) -> set[str]:
    """Modules of shoal that the module at `path` imports when it is itself imported."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("shoal."):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inside if module_at(name)} or {str(node.module)}
    return found


def module_at(name: str) -> Path | None:
    place = ROOT.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.exists()), None)


def test_no_modules_import_each_other_in_a_circle() -> None:
    paths = [path for path in (ROOT / "shoal").rglob("*.py") if path.name != "__init__.py"]
    edges = {".".join(p.relative_to(ROOT).with_suffix("").parts): imported_modules(p) for p in paths}
    left = dict(edges)
    while free := [name for name, targets in left.items() if not targets & set(left)]:
        left = {name: targets for name, targets in left.items() if name not in free}
    assert not left, f"in a circle, or importing one: {sorted(left)}"
