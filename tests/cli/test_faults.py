"""What must fail, and how: one sentence on standard error, exit status 1, and nothing left behind or lost."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.errors import ShoalError
from shoal.training.settings import Settings

Fails = Callable[..., str]


TRAIN = ("train", "resnet10", "--data", "digits", "--limit", "100", "--epochs", "1", "--out", "out")
REDUCE = ("reduce", "teacher", "--budget", "300", "--out", "out", "--epochs", "1,1,3")


def own(name: str) -> tuple[str, ...]:
    return ("train", f"own:{name}", *TRAIN[2:])


ARGUMENTS: list[tuple[tuple[str, ...], str]] = [
    (("train", "resnet81", *TRAIN[2:]), "need one of"),
    ((*TRAIN, "--width", "0"), "need a finite number above 0"),
    ((*TRAIN, "--resolution", "0.3"), "need 1, 0.5 or 0.25"),
    ((*TRAIN, "--precision", "fp8"), "precision 'fp8'"),
    ((*TRAIN, "--device", "foo"), "device 'foo'"),
    ((*TRAIN, "--device", "meta"), "device 'meta'"),
    ((*TRAIN, "--device", "cuda:99"), "device 'cuda:99'"),
    ((*TRAIN, "--seed", "-1"), "seed -1"),
    ((*TRAIN, "--max-seconds", "-1"), "time limit of -1"),
    ((*TRAIN, "--max-seconds", "nan"), "time limit of nan"),
    ((*TRAIN, "--shard-mb", "0.01"), r"limit of 0\.01 MB .*need 0\.064 or more"),
    ((*TRAIN, "--shard-mb", "nan"), "limit of nan MB"),
    ((*TRAIN, "--tensorboard"), "no TensorBoard"),
    (own("Twisted"), "torch.fx cannot trace"),
    (own("narrow"), "need 10 logits"),
    (own("greedy"), r"'own:greedy' gives no network \(TypeError: .*'depth'"),
    (own("number"), "gives a int; need a torch.nn.Module"),
    (own("absent"), "need package.module:callable"),
    (("count", ":x"), r"':x' gives no network \(ValueError"),
    (("count", "own:greedy", "--input", "1x16x16"), "need package.module:callable without arguments"),
    (("count", "math:pi"), r"'math:pi' gives no network \(TypeError"),
    ((*REDUCE, "--device", "foo"), "device 'foo'"),
    ((*REDUCE, "--precision", "fp8"), "precision 'fp8'"),
    ((*REDUCE, "--tensorboard"), "no TensorBoard"),
    ((*REDUCE, "--sensitivity", "list.json"), "no sensitivities at list.json"),
    (("reduce", "plain", "--budget", "300", "--out", "out"), "one stage; .*--no-exit"),
    (("reduce", "reduced", "--budget", "300", "--out", "out"), "reduced already"),
    (("demo", "--out", "out", "--images", "0"), "0 images to query"),
    (("demo", "--out", "out", "--seed", "-1"), "seed -1"),
]


@pytest.mark.parametrize(("words", "pattern"), ARGUMENTS, ids=lambda v: " ".join(v[:2]) if isinstance(v, tuple) else "")
def test_bad_arguments_are_refused_before_anything_is_written(
    words: tuple[str, ...], pattern: str, here: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (here / "list.json").write_text("[]")
    assert_match(pattern, fails(*words))
    assert not (here / "out").exists()


def assert_match(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


def test_cuda_without_a_gpu_is_one_sentence(here: Path, fails: Fails) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "device 'cuda' cannot be used" in fails(*TRAIN, "--device", "cuda")
    assert not (here / "out").exists()


def test_demo_without_spu_does_not_train_first(here: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "spu" else find(name, *more))
    assert "need Python 3.10 or 3.11 with the private extra" in fails("demo", "--out", "out")
    assert not (here / "out").exists()


# ---------------------------------------------------------------- damaged and foreign files


def summary_with(accuracy: str) -> str:
    figures = f'{{"accuracy": {accuracy}, "relus": 1, "macs": 1}}'
    return f'{{"data": "digits", "model": "x", "seed": 0, "baseline": {figures}, "reduced": {figures}}}'


DAMAGES: list[tuple[tuple[str, ...], str, str, str]] = [
    (("evaluate", "teacher"), "config.json", "{}", "no usable 'data'"),
    (("evaluate", "teacher"), "config.json", "[]", "no usable 'data'"),
    (("evaluate", "teacher"), "config.json", '{"data": "digits", "seed": "x"}', "no usable 'seed'"),
    (("compile", "teacher", "--out", "out"), "config.json", "{}", "no usable 'data'"),
    (REDUCE, "config.json", "{}", "no usable 'data'"),
    (REDUCE, "config.json", '{"data": 3', "no readable JSON"),
    (("evaluate", "teacher"), "model.json", "{}", "no network spec"),
    (("evaluate", "teacher"), "model.safetensors", "", "unreadable weight file"),
    (("report", "teacher"), "summary.json", "{}", "no data, model, seed, baseline, reduced in"),
    (("report", "teacher"), "summary.json", "[]", "no data, model, seed, baseline, reduced in"),
    (("report", "teacher"), "summary.json", "\0", "no readable JSON"),
    (("report", "teacher"), "summary.json", summary_with("1e999"), "no finite number for 'accuracy'"),
    (("report", "teacher"), "summary.json", summary_with('"98"'), "no finite number for 'accuracy'"),
    (("report", "teacher"), "config.json", "[]", "no settings by name"),
    (("report", "teacher"), "budget.json", '{"counts": {"a": 1}, "sizes": {"b": 1}}', "no counts and sizes by site"),
    (("report", "teacher"), "metrics.jsonl", '{"stage": "mask", "accuracy": NaN}\n', "no finite accuracy in every row"),
    (("report", "teacher"), "metrics.jsonl", '{"a": 1}\n', "a row without stage and accuracy"),
    (("report", "teacher"), "metrics.jsonl", "[1]\n", "a row without stage and accuracy"),
    (("report", "teacher"), "metrics.jsonl", '{"stage": "mask", "accuracy": "x"}\n', "a row without stage"),
    (("report", "teacher"), "metrics.jsonl", '{"stage": "te', "no metrics"),
    (("train", "resnet10", "--data", "digits", "--out", "teacher", "--resume"), "config.json", "[]", "same config"),
]


@pytest.mark.parametrize(("words", "name", "text", "pattern"), DAMAGES)
def test_foreign_files_of_a_run_are_one_sentence(
    words: tuple[str, ...], name: str, text: str, pattern: str, here: Path, fails: Fails
) -> None:
    (here / "teacher" / name).write_text(text)
    assert_match(pattern, fails(*words))
    assert not (here / "out").exists()


def test_altered_weights_are_refused(here: Path, fails: Fails) -> None:
    path = here / "teacher" / "model.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-100] ^= 1
    path.write_bytes(bytes(blob))
    for words in (("evaluate", "teacher"), ("compile", "teacher", "--out", "out"), REDUCE):
        assert "tensors unlike what was saved at" in fails(*words)
    assert not (here / "out").exists()


@pytest.mark.slow
def test_the_console_script_finds_a_module_in_the_current_folder(here: Path) -> None:
    script = Path(sys.executable).parent / "shoal"
    if not script.exists():
        pytest.skip("needs the package installed")
    done = subprocess.run(
        [script, "count", "own:plain", "--input", "1x16x16", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=here,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["relus"] == 2 * 4 * 256


def test_the_import_path_is_given_back(here: Path, fails: Fails) -> None:
    before = list(sys.path)
    fails("count", "own:greedy")
    assert sys.path == before


def test_a_network_made_in_memory_says_what_to_do(here: Path, fails: Fails) -> None:
    path = here / "teacher" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": "given"}))
    assert "made in memory" in fails("evaluate", "teacher")


def test_settings_speak_to_python_users_too() -> None:
    for change in ({"precision": "fp8"}, {"device": "foo"}, {"seed": 2**32}, {"max_seconds": -1.0}):
        values: dict[str, Any] = change
        with pytest.raises(ShoalError, match="need"):
            replace(Settings(), **values).check()
