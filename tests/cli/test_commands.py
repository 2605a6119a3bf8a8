"""The command line as a user meets it: JSON keys, a small reduction with resume, one sentence for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.errors import ShoalError
from shoal.networks.stored import load_network
from shoal.storage.run import Run


def call(*words: str) -> str:
    done = CliRunner().invoke(app, [str(w) for w in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_count_has_the_promised_keys() -> None:
    body = json.loads(call("count", "resnet18", "--input", "3x32x32", "--classes", "100", "--json"))
    assert {"relus", "macs", "depth", "params", "sites"} <= set(body)
    assert (body["relus"], body["macs"], body["depth"]) == (557_056, 555_417_600, 17)
    assert set(body["sites"][0]) == {"name", "shape", "relus", "stage", "block"}
    assert sum(s["relus"] for s in body["sites"]) == body["relus"]


def test_count_takes_a_users_own_callable() -> None:
    body = json.loads(call("count", "examples.quickstart:MyCNN", "--input", "1x16x16", "--json"))
    assert body["relus"] == 3 * 8 * 256 + 16 * 64 + 16 * 16


def test_help_teaches() -> None:
    for command in (
        "",
        "count",
        "train",
        "reduce",
        "evaluate",
        "report",
        "compile",
        "certs",
        "serve",
        "query",
        "plan",
        "demo",
    ):
        assert len(call(*filter(None, (command, "--help")))) > 200


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    small = ("--data", "digits", "--width", "0.125", "--limit", "300")
    call("train", "resnet10", *small, "--epochs", "2", "--out", folder / "teacher", "--json")
    return folder


def reduce_words(runs: Path, name: str) -> tuple[str, ...]:
    gates = ("--budget", "900", "--d-th", "0.12", "--epochs", "1,1,3")
    return ("reduce", str(runs / "teacher"), "--out", str(runs / name), *gates, "--json")


def test_reduce_evaluate_report(runs: Path) -> None:
    summary = json.loads(call(*reduce_words(runs, "reduced")))
    assert summary["reduced"]["relus"] <= 900
    assert summary["reduced"]["depth"] < summary["baseline"]["depth"]
    assert set(summary["reduced"]["macs_accounting"]) == {"honest", "paper"}
    spec, model = load_network(Run(runs / "reduced"))
    assert spec.committed
    assert not any(name in dict(model.named_modules()) for name in summary["reduced"]["replaced_blocks"])
    body = json.loads(call("evaluate", str(runs / "reduced"), "--fixed", "--json"))
    assert body["accuracy"] == summary["reduced"]["accuracy"]
    assert body["argmax_equal"] >= 0.99 * body["images"]
    assert body["max_abs_logit_error"] <= body["error_bound"]
    rows = json.loads(call("report", str(runs / "reduced"), "--csv", str(runs / "rows.csv"), "--json"))
    assert rows[0]["reduced.relus"] == summary["reduced"]["relus"]
    for picture in ("budget.png", "curves.png"):
        assert (runs / "reduced" / picture).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.usefixtures("epochwise")
@pytest.mark.slow
def test_a_stopped_reduction_resumes_to_the_same_network(runs: Path) -> None:
    whole = json.loads(call(*reduce_words(runs, "whole")))
    words = reduce_words(runs, "parts")
    # The limit counts for the whole command: of all stages' five epochs, one a call.
    for epochs in range(1, 5):
        with pytest.raises(ShoalError, match="time is up"):
            call(*words, *(["--resume"] if epochs > 1 else []), "--max-seconds", "0")
        assert len(Run(runs / "parts").metrics()) == epochs
    summary = json.loads(call(*words, "--resume", "--max-seconds", "0"))
    assert summary["reduced"]["accuracy"] == whole["reduced"]["accuracy"]


def test_bad_input_gets_one_sentence_and_nothing_is_lost(runs: Path, tmp_path: Path) -> None:
    teacher, out = str(runs / "teacher"), str(tmp_path / "out")
    before = sorted(p.name for p in (runs / "teacher").iterdir())
    rows = [
        (("count", "resnet18", "--input", "32x32"), "found --input '32x32'"),
        (("count", "resnet81"), "need one of"),
        (("count", "nowhere:Net"), "package.module:callable"),
        (("train", "resnet10", "--data", "digitz", "--out", out), "digits"),
        (("train", "resnet10", "--data", "cifar10", "--data-dir", str(tmp_path), "--out", out), "cifar-10-python"),
        (("train", "resnet10", "--data", "digits", "--preset", "slow", "--out", out), "preset 'slow'"),
        (("train", "resnet10", "--data", "digits", "--out", teacher), "found a run"),
        (("train", "resnet10", "--data", "digits", "--out", teacher, "--resume"), "same configuration"),
        (("reduce", teacher, "--budget", "0", "--out", out), "budget of 0"),
        (("reduce", teacher, "--budget", "-5", "--out", out), "budget of -5"),
        (("reduce", teacher, "--budget", "99999999", "--out", out), "budget of 99,999,999"),
        (("reduce", teacher, "--budget", "500", "--masks", "best", "--out", out), "masks 'best'"),
        (("reduce", teacher, "--budget", "500", "--gate", "relu1", "--out", out), "no replaceable block 'relu1'"),
        (("reduce", teacher, "--budget", "500", "--recipe", "deep", "--out", out), "recipe 'deep'"),
        (("reduce", teacher, "--budget", "500", "--epochs", "1,1,1", "--out", out), "gates open at 1"),
        (("reduce", str(tmp_path), "--budget", "500", "--out", out), "no finished network"),
        (("evaluate", str(tmp_path)), "no finished network"),
        (("report", str(tmp_path)), "no summary.json"),
    ]
    for words, pattern in rows:
        with pytest.raises(ShoalError, match=pattern):
            call(*words)
        assert not Path(out).exists()
    assert sorted(p.name for p in (runs / "teacher").iterdir()) == before


@pytest.mark.slow
def test_quickstart_runs() -> None:
    from examples import quickstart

    figures = quickstart.main(epochs=4)
    assert figures["accuracy"] > 60
    assert figures["relus"] <= 600 < figures["baseline_relus"]
