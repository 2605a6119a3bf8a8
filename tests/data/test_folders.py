"""Folder layouts that people have: splits, what programs leave behind, and text files of other systems."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shoal.data.loading import load
from shoal.errors import ShoalError, ShoalWarning
from tests.support.clouds import write_text_layout
from tests.support.layouts import check, write_folder, write_image, write_tiny

# Of the classes cat (level 0) and dog (level 200), each split has 10 images per class.


@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        (("train", "test"), (18, 2, 20)),
        (("train", "test", "val"), (20, 20, 20)),
        (("train", "test", "valid"), (20, 20, 20)),
        (("train", "test", "validation"), (20, 20, 20)),
        (("train", "val"), (18, 2, 20)),
        (("train", "validation"), (18, 2, 20)),
        (("",), (14, 2, 4)),
    ],
)
def test_the_folders_of_splits(tmp_path: Path, parts: tuple[str, ...], counts: tuple[int, int, int]) -> None:
    write_folder(tmp_path, parts)
    data = load("folder", tmp_path)
    check(data, *counts, (3, 8, 8), 2)
    for split in (data.train, data.val, data.test):
        assert torch.equal((split.images[:, 0, 0, 0] > 100).long(), split.labels)


def mark(folder: Path, level: int) -> None:
    """Replace the images of the class `cat` by one of another level, so that the split can be recognised."""
    for path in (folder / "cat").iterdir():
        path.unlink()
    write_image(folder / "cat" / "a.png", level=level)


@pytest.mark.parametrize(
    ("parts", "splits"),
    [
        (("train", "test", "val"), {"train": "train", "test": "test", "val": "val"}),
        (("train", "val"), {"train": "train", "val": "test"}),
    ],
)
def test_each_folder_is_the_split_of_its_name(tmp_path: Path, parts: tuple[str, ...], splits: dict[str, str]) -> None:
    write_folder(tmp_path, parts)
    for level, part in enumerate(parts, 1):
        mark(tmp_path / part, 20 * level)
    data = load("folder", tmp_path, val=0)
    for level, part in enumerate(parts, 1):
        assert (getattr(data, splits[part]).images == 20 * level).any(), part


def test_a_limit_leaves_the_given_validation_folder_whole(tmp_path: Path) -> None:
    write_folder(tmp_path, ("train", "test", "val"))
    data = load("folder", tmp_path, limit=6)
    assert [len(split) for split in (data.train, data.val, data.test)] == [6, 20, 20]
    assert data.train.labels.bincount().tolist() == [3, 3]


def test_a_limit_of_one_image(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = load("folder", tmp_path, limit=1)
    assert len(data.train) == 1
    assert data.normalise(data.train.images).isfinite().all()


def test_a_validation_folder_may_lack_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_image(tmp_path / "val" / "dog" / "a.png")
    assert load("folder", tmp_path).val.labels.tolist() == [1]


def test_a_test_folder_without_classes_is_replaced_by_the_validation_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, ("train", "val"))
    write_image(tmp_path / "test" / "unlabelled.png")
    with pytest.warns(ShoalWarning, match="no class folder at .*test; .* the test split is val/"):
        assert len(load("folder", tmp_path).test) == 20


@pytest.mark.parametrize(
    ("parts", "spoil", "match"),
    [
        (("train", "val", "valid"), lambda root: None, "folders val and valid at .*; need one validation folder"),
        (("train", "test", "val"), lambda root: write_image(root / "val" / "emu" / "x.png"), "class emu at .*val"),
        (("train", "val"), lambda root: write_image(root / "val" / "emu" / "x.png"), "class emu at .*val"),
        (("train", "test", "val"), lambda root: (root / "val" / "cat").rename(root / "x"), None),
        (("train", "test", "val"), lambda root: write_image(root / "val" / "cat" / "x.png", 9), "9x9 at .*val.cat"),
        (("train",), lambda root: None, "no class folder at .*test"),
        (("test",), lambda root: None, "no class folder at .*train"),
    ],
)
def test_layouts_that_cannot_be_read(
    tmp_path: Path, parts: tuple[str, ...], spoil: Callable[[Path], object], match: str | None
) -> None:
    write_folder(tmp_path, parts)
    spoil(tmp_path)
    if match is None:
        assert len(load("folder", tmp_path).val) == 10
        return
    with pytest.raises(ShoalError, match=match):
        load("folder", tmp_path)


# ---- what programs leave behind


@pytest.mark.parametrize("parts", [("train", "test"), ("",)])
@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "$RECYCLE.BIN"])
def test_folders_of_other_programs_are_left_out_with_a_warning(
    tmp_path: Path, parts: tuple[str, ...], name: str
) -> None:
    write_folder(tmp_path, parts)
    write_image(tmp_path / parts[0] / name / "x.png")
    with pytest.warns(ShoalWarning) as caught:
        assert load("folder", tmp_path).class_names == ("cat", "dog")
    assert [f"found {name} at " in str(warning.message) for warning in caught] == [True]


@pytest.mark.parametrize("parts", [("train", "test"), ("",)])
@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".git"])
def test_hidden_folders_are_left_out(tmp_path: Path, parts: tuple[str, ...], name: str) -> None:
    write_folder(tmp_path, parts)
    write_image(tmp_path / parts[0] / name / "x.png")
    write_image(tmp_path / parts[0] / "cat" / name / "x.png")
    assert load("folder", tmp_path).class_names == ("cat", "dog")


def test_a_hidden_folder_makes_no_split_of_a_class_called_train(tmp_path: Path) -> None:
    for name in ("train", "tram"):
        for i in range(5):
            write_image(tmp_path / name / f"{i}.png")
    write_image(tmp_path / "train" / ".ipynb_checkpoints" / "x.png")
    assert load("folder", tmp_path, val=0).class_names == ("train", "tram")


@pytest.mark.parametrize("name", ["Thumbs.db", "desktop.ini", ".DS_Store", "._0.png", "notes.txt", "labels", "a.h5"])
def test_files_of_other_programs_are_left_out(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    before = load("folder", tmp_path).fingerprint()
    (tmp_path / "train" / "cat" / name).write_bytes(b"no image")
    assert load("folder", tmp_path).fingerprint() == before


def test_a_single_class_gives_a_warning(tmp_path: Path) -> None:
    for i in range(10):
        write_image(tmp_path / "cat" / f"{i}.png")
    with pytest.warns(ShoalWarning, match=r"one class \(cat\) at .*; need two or more"):
        assert load("folder", tmp_path).classes == 1


# ---- names of built-in sets


def test_a_path_wins_over_a_set_of_its_name_and_a_bare_name_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    for path in ("./digits", str(tmp_path / "digits")):
        data = load(path)
        assert data.class_names == ("cat", "dog")
        assert data.fingerprint() == load("folder", "digits").fingerprint()
    assert load("digits").classes == 10


# ---- fingerprints


def test_the_fingerprint_of_a_folder_stays_what_it_was(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert load("folder", tmp_path).fingerprint() == FINGERPRINT


FINGERPRINT = "0e6fe7e1bb81ab5ed53e16fe478236bb224934f9f4c9c1d0a7c108e93e49abdf"
"""Computed before formats other than PNG and JPEG, and validation folders, were read."""


# ---- text from other systems


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lists_may_have_other_line_ends_and_a_byte_order_mark(tmp_path: Path, end: str, mark: str) -> None:
    write_tiny(tmp_path / "tiny")
    (tmp_path / "tiny" / "words.txt").write_text("n1\tone, uno\nn2\ttwo\n")
    write_text_layout(tmp_path, "modelnet10")
    plain = load("tiny-imagenet", tmp_path / "tiny"), load("modelnet10", tmp_path, size=16)
    for path in tmp_path.rglob("*.txt"):
        path.write_bytes((mark + path.read_text()).replace("\n", end).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load("tiny-imagenet", tmp_path / "tiny"), load("modelnet10", tmp_path, size=16)
    for one, other in zip(plain, again, strict=True):
        assert one.class_names == other.class_names
        assert one.fingerprint() == other.fingerprint()
