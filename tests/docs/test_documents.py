"""What README and docs show exists: commands, options, imports, names, files, figures."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import textwrap
from collections.abc import Iterator

import pytest
import typer

import shoal
from benchmarks.pages import readme
from shoal.cli.app import app
from shoal.cli.commands import Commands
from tests.support.documents import (
    DOCUMENTS,
    ROOT,
    Call,
    bare_options,
    benchmark_calls,
    blocks,
    dotted,
    links,
    paths,
    shoal_calls,
    text_of,
)

COMMANDS = Commands()


def options_of(command: str) -> set[str]:
    """Every spelling of a command's options; those of shoal itself for ""."""
    found = typer.main.get_command(app) if command == "" else COMMANDS[command]
    return {name for p in found.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}


def script_options(module: str) -> set[str]:
    """The options that a benchmark's source defines, and those of the benchmark modules that it imports."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    source = path.read_text()
    found = set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", source))
    for other in re.findall(r"from (benchmarks\.[\w.]+) import", source):
        found |= script_options(other)
    return found | {"--help"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_option_exists(document: str) -> None:
    text, wrong = text_of(document), []
    for call in shoal_calls(text, set(COMMANDS)):
        if call.name and call.name not in COMMANDS:
            wrong.append(f"shoal {call.name}")
        else:
            wrong += [f"shoal {call.name} {o}" for o in call.options if o not in options_of(call.name)]
    for call in benchmark_calls(text):
        if not ROOT.joinpath(*call.name.split(".")).with_suffix(".py").is_file():
            wrong.append(f"python -m {call.name}")
        else:
            wrong += [f"python -m {call.name} {o}" for o in call.options if o not in script_options(call.name)]
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS)
def test_an_option_without_its_command_belongs_to_some_command(document: str) -> None:
    known = {option for command in ("", *COMMANDS) for option in options_of(command)}
    modules = {call.name for call in benchmark_calls(text_of(document))}
    scripts = {path for path in paths(text_of(document)) if re.fullmatch(r"benchmarks/[\w/]+\.py", path)}
    modules |= {path.removesuffix(".py").replace("/", ".") for path in scripts}
    known |= {option for module in modules for option in script_options(module)}
    wrong = bare_options(text_of(document)) - known
    assert not wrong


def test_commands_are_found_in_code() -> None:
    text = """Use `shoal train NET --epochs 2` or `certs --name
HOST` in the `shoal` shell, `--json`; not `--a b` here: --no-code.

```
shoal compile RUN --out artifact; shoal certs certs   # --comment
/opt/bin/shoal prepare CLIENT \\
    --count 3
python -m benchmarks.private.direct --rounds 3
```
"""
    assert shoal_calls(text, {"certs"}) == [
        Call("compile", ("--out",)),
        Call("certs", ()),
        Call("prepare", ("--count",)),
        Call("train", ("--epochs",)),
        Call("certs", ("--name",)),
    ]
    assert benchmark_calls(text) == [Call("benchmarks.private.direct", ("--rounds",))]
    assert bare_options(text) == {"--json", "--a"}
    whole = [call for document in DOCUMENTS for call in shoal_calls(text_of(document), set(COMMANDS))]
    assert set(COMMANDS) == {call.name for call in whole} - {""}


def python_blocks() -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        for language, body in blocks(text_of(document)):
            if language == "python":
                yield document, textwrap.dedent(body)


@pytest.mark.parametrize(("document", "source"), [pytest.param(*pair, id=pair[0]) for pair in python_blocks()])
def test_imports_in_python_code_work(document: str, source: str) -> None:
    # pytest makes any warning an error, that of an old path, too.
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert hasattr(importlib.import_module(str(node.module)), alias.name), f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "shoal":
            assert node.attr in shoal.__all__


def test_readme_shows_python_code() -> None:
    assert [document for document, _ in python_blocks() if document == "README.md"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_dotted_names_exist(document: str) -> None:
    for name in dotted(text_of(document)):
        found, parts = shoal, name.split(".")[1:]
        for i, part in enumerate(parts):
            if not hasattr(found, part):
                importlib.import_module(".".join(["shoal", *parts[: i + 1]]))
            found = getattr(found, part)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    wrong = []
    for path in paths(text_of(document)):
        pattern = path.rstrip("/").split("::")[0].split(":")[0]
        if not any(any(root.glob(pattern)) for root in (ROOT, ROOT / "shoal")):
            wrong.append(path)
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_of_the_repository(document: str) -> None:
    folder = (ROOT / document).parent
    assert not [target for target in links(text_of(document)) if not (folder / target).is_file()]


def test_links_are_found() -> None:
    assert links("[a](b.md#c) ![d](e.png) [f](https://g.org/h.md) [i](#j) `[k](l.md)`") == ["b.md", "e.png"]


def test_figures_are_those_of_the_result_files() -> None:
    before = readme.pages()
    assert readme.differences(before, readme.filled(before)) == []


def test_check_lists_an_altered_figure_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = readme.pages()
    monkeypatch.setattr(sys, "argv", ["readme", "--check"])
    with pytest.raises(SystemExit) as ended:
        readme.main()
    assert ended.value.code == 0
    altered = pages | {"README.md": re.sub(r"(<!-- demo -->.*?)19,456", r"\g<1>19,457", pages["README.md"], flags=re.S)}
    assert altered != pages
    monkeypatch.setattr(readme, "pages", lambda: altered)
    with pytest.raises(SystemExit, match=r"README\.md: has: .*19,457.*\nREADME\.md: needs: .*19,456"):
        readme.main()
    monkeypatch.undo()
    assert readme.pages() == pages


def test_markers_without_a_section_are_noticed() -> None:
    with pytest.raises(SystemExit, match="markers of nothing"):
        readme.filled(readme.pages() | {"docs/new.md": "<!-- nothing -->\n1\n<!-- end -->\n"})
