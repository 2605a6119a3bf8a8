"""Flipped bytes, full disks, and places that cannot be written."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from shoal.cli.app import app
from shoal.errors import ShoalError
from shoal.private.transport.certs import make_certificates
from shoal.storage.files import append_line
from shoal.storage.run import Run
from shoal.storage.tensors import read_tensors, write_tensors

Fails = Callable[..., str]


TRAIN = ("train", "resnet10", "--data", "digits", "--limit", "100", "--epochs", "1", "--out", "out")
REDUCE = ("reduce", "teacher", "--budget", "300", "--out", "out", "--epochs", "1,1,3")


def assert_match(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


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
