"""What must fail, and how: one sentence on standard error, exit status 1, and nothing left behind or lost."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shoal.cli.app import app, main
from shoal.errors import ShoalError
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.networks.stored import save_network
from shoal.private.transport.certs import make_certificates
from shoal.storage.files import append_line
from shoal.storage.run import Run
from shoal.storage.tensors import read_tensors, write_tensors
from shoal.training.settings import Settings

OWN = """
import torch
from torch import nn

def plain():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10),
    )

def greedy(depth):
    return plain()

def narrow():
    return nn.Sequential(plain(), nn.Linear(10, 3))

class Twisted(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def number():
    return 3
"""
"""The user's own module, in the current folder."""

Fails = Callable[..., str]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fails:
    """Runs the command line in this process; it must end as users are promised. Returns the sentence."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["shoal", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        assert (ended.value.code, len(lines)) == (1, 1), lines
        assert lines[0].startswith("shoal: found ")
        return lines[0]

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's module, the runs `teacher`, `plain` and `reduced`, and a file `afile`."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "own.py").write_text(OWN)
    (folder / "afile").write_text("mine")
    scope: dict[str, Any] = {}
    exec(OWN, scope)
    finished(folder / "teacher", Spec("resnet10", 10, (1, 16, 16), 0.125))
    finished(folder / "plain", Spec("own:plain", 10, (1, 16, 16)), scope["plain"]())
    finished(folder / "reduced", Spec("resnet10", 10, (1, 16, 16), 0.125, masked=("layer1.0.relu1",)))
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of what is made, as the current folder."""
    folder = Path(shutil.copytree(made, tmp_path / "here"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    sys.modules.pop("own", None)


def finished(folder: Path, spec: Spec, base: nn.Module | None = None) -> None:
    """An untrained network's run with all the files that a reduction leaves."""
    run = Run.create(folder, {"command": "train", "data": "digits", "seed": 0, "limit": 200})
    save_network(run, spec, assemble(spec, base))
    run.log("teacher", {"epoch": 0, "accuracy": 10.0})
    figures = {"accuracy": 10.0, "relus": 100, "macs": 1000}
    summary = {"data": "digits", "model": spec.base, "seed": 0, "baseline": figures, "reduced": figures}
    run.write_json("summary.json", summary)


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


def test_no_flipped_byte_changes_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor([True, False]), "c": torch.tensor(7), "d": torch.empty(0)}
    tensors["e"] = torch.randn(4).to(torch.bfloat16)
    write_tensors(path, tensors, {"progress": "{}"})
    blob = path.read_bytes()
    for i in range(len(blob)):
        path.write_bytes(blob[:i] + bytes([blob[i] ^ 4]) + blob[i + 1 :])
        try:
            found = read_tensors(path)
        except ShoalError:
            continue
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())


# ---------------------------------------------------------------- places that cannot be written


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As on a full disk, writing fails in the middle of a file: here beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


PLACES: list[tuple[tuple[str, ...], str]] = [
    ((*TRAIN, "--out", "afile"), "a file at afile"),
    ((*TRAIN, "--out", "afile/x"), r"afile/x/config.json cannot be written \(.*Not a directory"),
    ((*REDUCE, "--out", "afile/x"), "afile/x/config.json cannot be written"),
    (("compile", "teacher", "--out", "afile/x"), "afile/x/client/program.json cannot be written"),
    (("report", "teacher", "--csv", "afile/x.csv"), "afile/x.csv cannot be written"),
    (("report", "teacher", "--csv", "/proc/nonexistent/x.csv"), "x.csv cannot be written"),
    (("report", "teacher", "--csv", "teacher"), "teacher cannot be written"),
    (("certs", "afile/x"), "ca.pem cannot be written"),
    (("demo", "--out", "afile"), "afile"),
    (("demo", "--out", "afile/x"), "afile/x/config.json cannot be written"),
]


@pytest.mark.parametrize(("words", "pattern"), PLACES)
def test_places_that_cannot_be_written(
    words: tuple[str, ...], pattern: str, here: Path, fails: Fails, request: pytest.FixtureRequest
) -> None:
    if words[0] in ("certs", "demo"):
        pytest.importorskip("cryptography")
    if words[0] == "demo":
        request.getfixturevalue("spu")
    before = tree(here)
    assert_match(pattern, fails(*words))
    after = tree(here)
    after.pop("teacher/curves.png", None)  # which report draws first
    assert after == before


FULL: list[tuple[tuple[str, ...], int, str]] = [
    (TRAIN, 40, r"config.json cannot be written \(.*File too large"),
    (("compile", "teacher", "--out", "out"), 1000, "program.json cannot be written"),
    (("compile", "teacher", "--out", "out"), 30_000, "server/weights.safetensors cannot be written"),
    (("report", "teacher"), 1000, "curves.png cannot be written"),
    (("report", "plain", "--csv", "out/rows.csv"), 200, "rows.csv cannot be written"),
    (("certs", "out"), 300, "out/ca.pem cannot be written"),
]


@pytest.mark.parametrize(("words", "size", "pattern"), FULL)
def test_a_full_disk_leaves_no_half_file(
    words: tuple[str, ...], size: int, pattern: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "certs":
        pytest.importorskip("cryptography")
    (here / "plain" / "metrics.jsonl").unlink()
    monkeypatch.setattr(sys, "argv", ["shoal", *words])
    with no_file_above(size), pytest.raises(ShoalError, match=pattern):
        app(standalone_mode=False)
    assert all(len(blob) < size for name, blob in tree(here).items() if name.startswith("out"))
    assert not [name for name in tree(here) if name.endswith(".tmp")]
    assert not (here / "teacher" / "curves.png").exists()


def test_a_full_disk_leaves_whole_rows_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log" / "metrics.jsonl"
    append_line(path, "a" * 50)
    with no_file_above(80), pytest.raises(ShoalError, match="cannot be written"):
        append_line(path, "b" * 50)
    assert path.read_text() == "a" * 50 + "\n"
    path.write_text('{"stage": "te')  # cut off by a kill
    append_line(path, "c")
    assert path.read_text() == '{"stage": "te\nc\n'


def test_certificates_are_replaced_only_when_asked_for(tmp_path: Path, fails: Fails) -> None:
    pytest.importorskip("cryptography")
    make_certificates(tmp_path)
    before = tree(tmp_path)
    assert "a certificate at" in fails("certs", tmp_path)
    with no_file_above(300), pytest.raises(ShoalError, match="cannot be written"):
        make_certificates(tmp_path, overwrite=True)
    assert tree(tmp_path) == before
    make_certificates(tmp_path, overwrite=True)
    after = tree(tmp_path)
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    with pytest.raises(ShoalError, match="found host name"):
        make_certificates(tmp_path / "new", ("ümlaut",))
    assert not (tmp_path / "new").exists()


def test_files_that_are_no_runs_are_kept(here: Path, fails: Fails) -> None:
    (here / "out").mkdir()
    (here / "out" / "model.safetensors").write_text("mine")
    for words in (TRAIN, (*TRAIN, "--resume"), REDUCE):
        assert "files at out (model.safetensors) and no run" in fails(*words)
    assert tree(here / "out") == {"model.safetensors": b"mine"}
    (here / "out" / "model.safetensors").rename(here / "out" / ".config.json.tmp")
    Run(here / "out").check_free()  # what a kill at the very start leaves


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
