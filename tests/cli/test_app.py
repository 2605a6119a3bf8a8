"""What all commands share: help, version, exit statuses, errors as JSON, quiet and verbose."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from shoal import __version__
from shoal.cli.app import TOUR, app, continuation, main
from shoal.cli.commands import ENTRIES, GROUPS, Commands
from shoal.progress import verbosity
from tests.support.tables import fast_first

RUN = CliRunner()


def status(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit status of `shoal WORDS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["shoal", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_help_lists_every_command_once_in_its_group() -> None:
    text = RUN.invoke(app, ["--help"]).stdout
    for title, entries in GROUPS.items():
        section = text.partition(f"\n{title}:\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines() if line[2:3].strip()] == list(entries)


def test_the_tour_is_printed_as_it_is_written_and_fits() -> None:
    assert TOUR in RUN.invoke(app, ["--help"]).stdout
    assert max(map(len, TOUR.splitlines())) <= 80


@pytest.mark.parametrize("name", ENTRIES)
def test_every_command_has_help_in_both_spellings(name: str) -> None:
    long, short = (RUN.invoke(app, [name, flag]) for flag in ("--help", "-h"))
    assert long.exit_code == short.exit_code == 0
    assert long.stdout == short.stdout
    for option in ("--quiet", "--verbose"):
        assert option in long.stdout
    assert "--json" in long.stdout


@pytest.mark.parametrize("name", ENTRIES)
def test_every_option_and_argument_says_what_it_is(name: str) -> None:
    parameters = [p for p in Commands()[name].params if p.name != "help"]
    assert not [p.name for p in parameters if not (getattr(p, "help", "") or "").strip()]
    assert inspect.getdoc(Commands()[name].callback)


@pytest.mark.parametrize("entry", ENTRIES.values())
def test_lines_of_the_list_fit(entry: object) -> None:
    assert len(getattr(entry, "line")) <= 66  # noqa: B009
    assert getattr(entry, "line").endswith(".")  # noqa: B009


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"shoal {__version__}\n"


def test_an_error_is_a_sentence_and_with_json_an_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(monkeypatch, "count", "nosuch") == 1
    plain = capsys.readouterr()
    assert plain.out == ""
    assert status(monkeypatch, "count", "nosuch", "--json") == 1
    both = capsys.readouterr()
    assert both.err == plain.err
    body = json.loads(both.out)
    assert body["status"] == 1
    assert both.err == f"shoal: {body['error']}\n"
    assert "Traceback" not in both.err


def test_wrong_usage_ends_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(monkeypatch, "count") == 2
    assert status(monkeypatch, "nosuch") == 2
    assert status(monkeypatch, "count", "resnet10", "--nosuch") == 2


def test_very_verbose_shows_where_an_error_arose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(monkeypatch, "count", "nosuch", "-vv") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "level"), [([], 0), (["-q"], -1), (["-v"], 1), (["-v", "-v"], 2)])
@pytest.mark.parametrize("first", [True, False])
def test_verbosity_is_set_before_or_after_the_command(
    words: list[str], level: int, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("shoal.cli.inspect.show", lambda *_: seen.append(verbosity.get()))
    own = ["count", "osakd-cnn1"]
    assert status(monkeypatch, *((words + own) if first else (own + words))) == 0
    assert seen == [level]


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ("train resnet10 --out x", "train resnet10 --out x --resume"),
        ("train --resume resnet10 --out x", "train --resume resnet10 --out x"),
        ("train --out x -- resnet10", "train --out x --resume -- resnet10"),
    ],
)
def test_a_stopped_command_says_how_it_continues(words: str, more: str) -> None:
    assert continuation(words.split()) == f"shoal {more}"


@pytest.mark.parametrize(("level", "said"), fast_first([(0, ["INFO"]), (1, ["INFO"]), (2, ["DEBUG", "INFO"])]))
def test_a_log_as_json_is_json_when_verbose_too(level: int, said: list[str]) -> None:
    code = (
        "import logging; from shoal.jobs.serve import log_to_standard_error as log; "
        f"from shoal.progress import set_verbosity; set_verbosity({level}); log(True); "
        "logging.debug('less'); logging.info('more')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [json.loads(line)["level"] for line in done.stderr.splitlines()] == said
