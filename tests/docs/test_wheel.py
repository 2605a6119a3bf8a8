"""The wheel, built by way of the source distribution, works outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.documents import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist and the wheel made from it."""
    pytest.importorskip("build", reason="needs the dev extra")
    folder = tmp_path_factory.mktemp("build")
    tree, out = folder / "tree", folder / "dist"
    # A copy: building writes beside the sources, and what an earlier build left there would get into the wheel.
    shutil.copytree(ROOT / "shoal", tree / "shoal", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)], folder)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed in, without its dependencies."""
    target, (wheel,) = tmp_path_factory.mktemp("installed"), built.glob("*.whl")
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)], built)
    return target


def run(command: list[str], folder: Path, **more: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shipped() -> set[str]:
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / "shoal").rglob("*") if p.is_file() and p.suffix != ".pyc"}


def test_wheel_and_sdist_have_every_file_of_the_package_and_no_other(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == shipped()
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {*shipped(), "LICENSE", "README.md", "pyproject.toml"} <= inside


def test_the_command_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    def python(*words: str) -> str:
        return run([sys.executable, *words], tmp_path, PYTHONPATH=str(installed))

    assert python("-c", "import shoal; print(shoal.__file__)").strip() == str(installed / "shoal" / "__init__.py")
    version = python("-c", "import shoal; print(shoal.__version__)").strip()
    assert python("-m", "shoal", "--version").strip() == f"shoal {version}"
    (info,) = installed.glob("shoal-*.dist-info")
    assert info.name == f"shoal-{version}.dist-info"
    script = run([str(installed / "bin" / "shoal"), "demo", "--help"], tmp_path, PYTHONPATH=str(installed))
    assert script.startswith("Usage: shoal demo")
    assert "--out" in script
    count = python("-m", "shoal", "count", "resnet10", "--input", "3x32x32", "--json")
    assert '"relus"' in count


def test_the_report_finds_its_files_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = """
from importlib.resources import files
import shoal.report.published
print(shoal.report.published.__file__)
assert shoal.report.published.published()
for name in ("page.html", "page.css", "page.js", "charts.js", "published.csv"):
    assert files("shoal.report").joinpath(name).read_text()
assert files("shoal").joinpath("py.typed").is_file()
"""
    assert run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed)).startswith(str(installed))
