"""The README and the pages of docs/ as tests read them: code blocks, inline code, and the commands in both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = tuple(
    path.relative_to(ROOT).as_posix()
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
    if path.name != "CHANGELOG.md"  # which names what is no more
)
"""Every document that tells what is, by path."""

BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`(?!`)(?P<body>(?:[^`\n]|\n(?!\n))+)`")
SHOAL = re.compile(r"(?:^|[\s(/\"])shoal +(?!shoal )(?=[\w-])")
BENCHMARK = re.compile(r"python -m (benchmarks[\w.]+)(.*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Call:
    """A command of `shoal` ("" for shoal itself) or a module of benchmarks, and the options that stand behind it."""

    name: str
    options: tuple[str, ...]


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return [(match["language"], match["body"]) for match in BLOCK.finditer(text)]


def inline(text: str) -> list[str]:
    """Every piece of inline code, on one line each."""
    return [" ".join(match["body"].split()) for match in INLINE.finditer(BLOCK.sub("", text))]


def lines(text: str) -> Iterator[str]:
    """Lines of code as a shell sees them: those of blocks, joined where they go on, and each inline piece."""
    for _, body in blocks(text):
        yield from (_as_shell(line) for line in body.replace("\\\n", " ").splitlines())
    yield from inline(text)


def _as_shell(line: str) -> str:
    """A Dockerfile's CMD belongs to the entry point, which is shoal."""
    if line.startswith("CMD ["):
        return "shoal " + " ".join(re.findall(r'"([^"]*)"', line))
    return re.sub(r"(^|\s)#.*", "", line)


def shoal_calls(text: str, commands: set[str]) -> list[Call]:
    """Every call of shoal in the text's code, and inline code that begins with a command and has an option."""
    found = []
    for line in lines(text):
        for part in re.split(r"[;|]|&&", line):
            match = SHOAL.search(part)
            words = part[match.end() :] if match else part
            name = words.split()[0].strip('"') if words.split() else ""
            if match and not name.startswith(("-", "COMMAND")):
                found.append(Call(name, tuple(OPTION.findall(words))))
            elif match or (name in commands and OPTION.search(words)):
                found.append(Call(name if name in commands else "", tuple(OPTION.findall(words))))
    return found


def benchmark_calls(text: str) -> list[Call]:
    """Every call of a module of benchmarks in the text's code."""
    matches = (BENCHMARK.search(line) for line in lines(text))
    return [Call(match[1], tuple(OPTION.findall(match[2]))) for match in matches if match]


def bare_options(text: str) -> set[str]:
    """Options that inline code shows without the command that they belong to."""
    return {option for piece in inline(text) if piece.startswith("--") for option in OPTION.findall(piece)}


def paths(text: str) -> set[str]:
    """Files and folders of the repository that inline code names and does not write; ``*`` stands for several."""
    pieces = (word for piece in inline(text) for word in re.sub(r"--out \S+", "", piece).split() if "NAME" not in word)
    roots = ("shoal/", "tests/", "benchmarks/", "examples/", "docs/")
    return {piece for piece in pieces if piece.startswith(roots) or re.fullmatch(r"[a-z_]+(/[\w*]+)+\.py", piece)}


def dotted(text: str) -> set[str]:
    """Names below `shoal` that inline code gives as ``shoal.a.b``."""
    return {match[0] for piece in inline(text) if (match := re.match(r"shoal(\.[A-Za-z_]\w*)+(?![\w/])", piece))}


def links(text: str) -> list[str]:
    """Targets of links outside code that are no address and no heading of the same page, without the heading."""
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", INLINE.sub("", BLOCK.sub("", text)))
    return [target for target in targets if "://" not in target]
