"""Pages of the site that are files of the repository, and links to them.

MkDocs reads `docs/` alone. This hook adds the README, the contributor's files at the root, and every file of the
repository that `mkdocs.yml` or a page links to: notebooks and source as pages, anything else as it is. A link is
written as GitHub resolves it, relative to the file that it is in; the hook rewrites it for the site.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Files at the root and their pages."""

FOLDER = "repository/"
"""Where the other files of the repository are on the site."""

LANGUAGES = {
    ".py": "python",
    ".pyi": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".sh": "bash",
    "": "text",
}
"""Kinds of files that become a page with their text, and how it is highlighted."""

LINK = re.compile(r"(?P<code>^```.*?^```|`[^`\n]+`)|(?P<head>\]\()(?P<target>[^)\s]+)(?=\))", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, then what the navigation and all pages link to."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page in re.findall(rf"{FOLDER}\S+", json.dumps(config.nav).replace('"', " ")):
        add(files, config, page.removeprefix(FOLDER).removesuffix(".md"))
    for file in files.documentation_pages():
        if not file.src_uri.startswith(FOLDER):
            linked(file.content_string, file.src_uri, lambda path: add(files, config, path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text with links that work on the site."""
    return linked(markdown, page.file.src_uri, place)


def linked(markdown: str, page: str, resolve: Callable[[str], str]) -> str:
    """`markdown` of `page` with each link to a file of the repository, given by its path, changed to `resolve`'s page.

    Links to other sites, to headings of the page and to nothing that exists stay as they are.
    """
    folder, here = posixpath.dirname(repository_path(page)), posixpath.dirname(page)

    def change(match: re.Match[str]) -> str:
        target, _, anchor = (match["target"] or "").partition("#")
        path = posixpath.normpath(posixpath.join(folder, target))
        if match["code"] or not target or "://" in target or not (ROOT / path).is_file():
            return match[0]
        return match["head"] + posixpath.relpath(resolve(path), here or ".") + (f"#{anchor}" if anchor else "")

    return LINK.sub(change, markdown)


def repository_path(page: str) -> str:
    """The file of the repository that the site's `page` shows."""
    sources = {shown: source for source, shown in ROOT_PAGES.items()}
    if page.startswith(FOLDER):
        return page.removeprefix(FOLDER).removesuffix(".md")
    return sources.get(page, f"docs/{page}")


def place(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return FOLDER + path + (".md" if as_page(path) is not None else "")


def add(files: Files, config: MkDocsConfig, path: str) -> str:
    """Put a file of the repository on the site, unless it is there, and return its place."""
    uri, text = place(path), as_page(path)
    if files.get_file_from_path(uri) is None and uri.startswith(FOLDER):
        if text is not None:
            files.append(File.generated(config, uri, content=text))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return uri


def as_page(path: str) -> str | None:
    """A notebook's or a program's text as Markdown; None for files that are not shown as text."""
    suffix = Path(path).suffix
    if suffix == ".ipynb":
        return notebook(json.loads((ROOT / path).read_text()))
    if suffix in LANGUAGES:
        return f"# `{path}`\n\n```{LANGUAGES[suffix]}\n{(ROOT / path).read_text()}```\n"
    return None


def notebook(body: dict) -> str:
    """A notebook's cells as Markdown, without outputs."""
    parts = []
    for cell in body["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"
