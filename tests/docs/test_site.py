"""The documentation site: its reference is complete, links work there as on GitHub, and nothing is fetched."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
import yaml

import shoal
from tests.support.documents import ROOT, text_of

REFERENCE = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    spec = importlib.util.spec_from_file_location("repository_pages", ROOT / "docs" / "hooks" / "repository_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_public_name_once() -> None:
    shown = [name for page in REFERENCE.glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    public = [f"{module}.{name}" for module, names in shoal.PLACES.items() for name in names]
    public += [f"shoal.errors.{name}" for name in ("ShoalError", "ShoalWarning", "StoppedError")]
    assert sorted(shown) == sorted(public)


def test_the_reference_begins_with_a_table_of_all_names() -> None:
    rows = re.findall(r"^\| \[[^]]*\]\((\w+\.md)\) \| (.*) \|$", text_of("docs/reference/index.md"), re.M)
    assert {page for page, _ in rows} == {path.name for path in REFERENCE.glob("*.md")} - {"index.md"}
    for page, names in rows:
        shown = re.findall(r"^::: \S+\.(\w+)", (REFERENCE / page).read_text(), re.M)
        assert re.findall(r"`(\w+)`", names) == shown, page


def test_links_are_rewritten_for_the_site(hook: ModuleType) -> None:
    text = """[a](docs/serving.md#ending) ![b](docs/images/budget.png) [c](examples/quickstart.py) [d](#results)
[e](https://example.org/README.md) `[f](README.md)` [g](docs/nothing.md) [h](CONTRIBUTING.md)
```
[i](README.md)
```
"""
    changed = hook.linked(text, "index.md", hook.place)
    assert re.findall(r"\]\((\S+)\)", changed) == [
        "serving.md#ending",
        "images/budget.png",
        "repository/examples/quickstart.py.md",
        "#results",
        "https://example.org/README.md",
        "README.md",
        "docs/nothing.md",
        "contributing.md",
        "README.md",
    ]
    assert hook.linked("[a](../../README.md#results)", "papers/osakd.md", hook.place) == "[a](../index.md#results)"
    notebook = "repository/examples/notebooks/reduce_a_network.ipynb.md"
    assert hook.linked("[a](../../docs/serving.md)", notebook, hook.place) == "[a](../../../serving.md)"


def test_programs_and_notebooks_become_pages(hook: ModuleType) -> None:
    page = hook.as_page("examples/quickstart.py")
    assert page.startswith("# `examples/quickstart.py`\n\n```python\n")
    assert text_of("examples/quickstart.py") in page
    page = hook.as_page("examples/notebooks/reduce_a_network.ipynb")
    assert page.startswith("# Reduce a network")
    assert "```python\nimport os" in page
    assert hook.as_page("benchmarks/results/demo.json") is None


def test_commit_hooks_are_the_pinned_tools_of_the_environment() -> None:
    repos = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    assert [repo["repo"] for repo in repos] == ["local"]
    assert all(hook["language"] == "system" and hook["entry"].startswith(".venv/bin/") for hook in hooks)
    checks = re.findall(
        r"\$\(BIN\)/((?:ruff|mypy)[\w ]*)", text_of("Makefile").partition("check:")[2].partition("\n\n")[0]
    )
    entries = [hook["entry"].removeprefix(".venv/bin/").partition(" --")[0] for hook in hooks]
    assert entries == [check.strip() for check in checks]
    pinned = re.findall(r'"(ruff|mypy)==([\d.]+)"', text_of("pyproject.toml"))
    assert [name for name, _ in pinned] == ["ruff", "mypy"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_describes_every_name(site: Path) -> None:
    for page in REFERENCE.glob("*.md"):
        text = (site / "reference" / page.name).with_suffix(".html").read_text()
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.M):
            assert f'id="{name}"' in text, name
    assert not (site / "hooks").exists()


@pytest.mark.slow
def test_the_site_fetches_nothing(site: Path) -> None:
    loads = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*\shref=\"?(?:https?:)?//")
    imports = re.compile(r"@import\s+(?:url\()?[\"']?(?:https?:)?//|url\([\"']?(?:https?:)?//")
    pages, styles = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert pages
    assert styles
    assert not [page.name for page in pages if loads.search(page.read_text())]
    assert not [style.name for style in styles if imports.search(style.read_text())]


@pytest.mark.slow
def test_every_link_of_the_site_leads_to_a_file(site: Path) -> None:
    wrong = []
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links begin with the site's own address
            continue
        for target in re.findall(r"<a[^>]*\shref=\"([^\"#?:]+)[#\"]", page.read_text()):
            if not (page.parent / unquote(target)).exists():
                wrong.append(f"{page.relative_to(site)}: {target}")
    assert not wrong
