"""`shoal distill` end to end on digits, and every option that has no use where it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.errors import ShoalError
from shoal.jobs.distill import METHODS
from shoal.networks.stored import load_network
from shoal.report import read
from shoal.storage.run import Run

SMALL = ["resnet20", "--width", "0.125", "--epochs", "1"]
TWO = "tests.support.two_classifiers:TwoClassifiers"
DIGITS = ["--data", "digits", "--limit", "200"]


def run(*words: str) -> Any:
    result = CliRunner().invoke(app, [*words, "--json"])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    run("train", "resnet20", "--width", "0.25", "--epochs", "1", *DIGITS, "--out", str(folder), "--seed", "4")
    return folder


def test_osakd_leaves_a_run_that_other_commands_take(tmp_path: Path) -> None:
    out = tmp_path / "run"
    body = run("distill", "osakd", *SMALL, *DIGITS, "--k", "16", "--bank", "64", "--out", str(out))
    assert body["method"] == "osakd"
    assert len(body["classifiers"]) == 1
    assert body["reduced"]["params"] == body["baseline"]["params"]
    assert run("evaluate", str(out))["accuracy"] == pytest.approx(body["reduced"]["accuracy"])
    assert read(out) is not None
    spec, _ = load_network(Run(out), "baseline")
    assert not spec.is_reduced
    assert {row["stage"] for row in Run(out).metrics()} == {"distill", "baseline"}


@pytest.mark.slow
def test_an_assistant_and_its_teacher(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["distill", "takd", *SMALL, "--teacher", str(teacher), "--assistant", "resnet32", "--out", str(out)]
    body = run(*words)
    assert body["seed"] == 4
    assert body["teacher"]["params"] > body["reduced"]["params"]
    assert [row["stage"] for row in Run(out).metrics()] == ["assistant", "distill", "baseline"]
    again = run(*words, "--resume")  # nothing is left to do
    assert again["reduced"] == body["reduced"]
    assert len(Run(out).metrics()) == 3


@pytest.mark.slow
def test_branches_are_measured_and_one_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    body = run("distill", "ffl", *SMALL, *DIGITS, "--out", str(out))
    assert len(body["classifiers"]) == 3
    assert body["classifiers"][0] == pytest.approx(body["reduced"]["accuracy"])
    assert run("evaluate", str(out))["accuracy"] == pytest.approx(body["reduced"]["accuracy"])
    shown = CliRunner().invoke(app, ["distill", "ffl", *SMALL, *DIGITS, "--out", str(out), "--resume"])
    assert "that were trained together" in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["crd", *SMALL, *DIGITS], "found method 'crd'; need one of osakd, kd"),
        (["osakd", *SMALL], "found no --data and no --teacher"),
        (["osakd", *SMALL, *DIGITS, "--branches", "2"], "found --branches with method osakd"),
        (["osakd", *SMALL, *DIGITS, "--assistant", "resnet32"], "found --assistant with method osakd"),
        (["osakd", *SMALL, *DIGITS, "--k", "64"], "found k 64 with 64 samples in a batch"),
        (["osakd", *SMALL, *DIGITS, "--preset", "reference-code"], "found preset 'reference-code'; need one of quick"),
        (["osakd", *SMALL, *DIGITS, "--space", "cosine"], "found space 'cosine'"),
        (["osakd", *SMALL, *DIGITS, "--loss", "l1"], "found loss 'l1'"),
        (["dml", *SMALL, *DIGITS, "--k", "8"], "found k with method 'dml', where it has no effect"),
        (["dml", *SMALL, *DIGITS, "--include-self"], "found exclude_self with method 'dml'"),
        (["dml", *SMALL, *DIGITS, "--preset", "paper-resnet"], "found preset 'paper-resnet'; need one of quick, paper"),
        (["kd", *SMALL, *DIGITS], "found no teacher for method 'kd'"),
        (
            ["osakd", TWO, *DIGITS],
            f"found 2 classifiers in '{TWO}'; need a network with one",
        ),
        (["dml", TWO, *DIGITS], f"found 2 classifiers in '{TWO}'; need a network with one"),
        (["one", "osakd-cnn1", "--resolution", "0.25", *DIGITS], "found that the model fails|found a network with one"),
    ],
)
def test_refusals_before_anything_is_written(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=message):
        run("distill", *words, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kd", *SMALL, "--data", "digits"], "found --data with --teacher"),
        (["kd", *SMALL, "--seed", "0"], "found --seed with --teacher"),
        (["dml", *SMALL], "found one teacher for method 'dml'; need none"),
        (["osakd", *SMALL], "found --teacher with method osakd"),
        (["kd", *SMALL, "--assistant", "resnet32"], "found one assistant for method 'kd'"),
        (["at", "resnet10", "--width", "0.125"], "found 4 stages in the student and 3 in the teacher"),
    ],
)
def test_refusals_with_a_teacher(words: list[str], message: str, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=message):
        run("distill", *words, "--teacher", str(teacher), "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_help_names_every_method() -> None:
    shown = " ".join(CliRunner().invoke(app, ["distill", "--help"]).stdout.split())
    assert all(name in shown for name in METHODS)
