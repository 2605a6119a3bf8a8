"""Damaged, hostile and missing data: one clear sentence, and nothing of them runs. Each test writes its own files."""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from shoal.data import cifar, readers
from shoal.data.loading import load
from shoal.errors import ShoalError
from tests.support.layouts import (
    C10,
    C100,
    WRITERS,
    check_split,
    cifar_batch,
    idx,
    pixels,
    write_cifar,
    write_image,
    write_svhn,
)

FAST = settings(max_examples=300)


# ---- must fail: (what is broken, set, how, what the message must name)


def cut(path: str, keep: int) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / path).write_bytes((root / path).read_bytes()[:keep])

    return damage


def put(path: str, content: bytes) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / path).write_bytes(content)

    return damage


def drop(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).unlink()


def batch_of(**content: object) -> bytes:
    return pickle.dumps({key.encode(): value for key, value in content.items()}, 2)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
ZEROS = np.zeros((2, 3072), np.uint8)

MUST_FAIL: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("IDX truncated", "fashion-mnist", cut(IMAGES, 5000), "bytes at .*train-.*need 31376"),
    ("IDX header cut", "fashion-mnist", cut(IMAGES, 9), "train-.*magic"),
    ("IDX empty", "fashion-mnist", cut(LABELS, 0), "none at .*train-.*labels"),
    ("IDX magic", "fashion-mnist", put(IMAGES, b"\0\0\x0d\x03" + bytes(12)), "00000d03 at .*00000803"),
    ("IDX count", "fashion-mnist", put(LABELS, idx(np.zeros(39, np.uint8))), "40 images and 39 labels"),
    ("IDX label", "fashion-mnist", put(LABELS, idx(np.full(40, 10, np.uint8))), r"label 10 .*0\.\.9"),
    ("IDX size", "fashion-mnist", put(IMAGES, idx(np.zeros((40, 27, 28), np.uint8))), "27x28"),
    ("IDX no images", "fashion-mnist", put(IMAGES, idx(np.zeros((0, 28, 28), np.uint8))), "train-"),
    ("gzip damaged", "fashion-mnist", put(IMAGES, b"\x1f\x8b\x08" + bytes(20)), IMAGES),
    ("IDX missing", "fashion-mnist", drop("t10k-labels-idx1-ubyte"), "t10k-labels-idx1-ubyte"),
    ("batch missing", "cifar10", drop(f"{C10}/data_batch_3"), "data_batch_3"),
    ("pickle truncated", "cifar10", cut(f"{C10}/data_batch_2", 900), "data_batch_2"),
    ("pickle empty", "cifar10", cut(f"{C10}/data_batch_2", 0), "data_batch_2"),
    ("no labels", "cifar100", put(f"{C100}/train", batch_of(data=ZEROS)), "b'data'.* at .*train.*fine_labels"),
    ("no dict", "cifar100", put(f"{C100}/train", pickle.dumps([1], 2)), "found list at .*train"),
    ("row length", "cifar10", put(f"{C10}/test_batch", batch_of(data=ZEROS[:, 1:], labels=[0, 1])), "3071.*test_b"),
    ("no array", "cifar10", put(f"{C10}/test_batch", batch_of(data=b"x", labels=[0])), "no array as data"),
    ("array type", "cifar10", put(f"{C10}/test_batch", batch_of(data=ZEROS / 2, labels=[0, 1])), "not uint8.*test_b"),
    ("label count", "cifar10", put(f"{C10}/test_batch", batch_of(data=ZEROS, labels=[0])), "1 labels at .*test_b"),
    ("label range", "cifar10", put(f"{C10}/test_batch", batch_of(data=ZEROS, labels=[0, 10])), "bad labels.*test_b"),
    ("label type", "cifar10", put(f"{C10}/test_batch", batch_of(data=ZEROS, labels=[0, "1"])), "bad labels.*test_b"),
    ("mat random", "svhn", put("test_32x32.mat", b"MATLAB 5.0" + bytes(300)), "test_32x32.mat"),
    ("mat truncated", "svhn", cut("train_32x32.mat", 2000), "train_32x32.mat"),
    ("mat missing", "svhn", drop("test_32x32.mat"), "test_32x32.mat"),
    ("mat no X", "svhn", lambda root: savemat(root / "train_32x32.mat", {"y": [[1]]}), "found X .*train_32x32"),
    ("mat no y", "svhn", lambda root: savemat(root / "train_32x32.mat", {"X": pixels(32, 32, 3, 2)}), "0 labels"),
    ("mat label 0", "svhn", lambda root: write_svhn(root, y=np.zeros((30, 1), np.uint8)), r"y .*1\.\.10"),
    ("mat label nan", "svhn", lambda root: write_svhn(root, y=np.full((30, 1), np.nan)), r"y .*1\.\.10"),
    ("JPEG damaged", "tiny-imagenet", cut("train/n1/images/n1_3.JPEG", 100), r"n1_3\.JPEG"),
    ("JPEG missing", "tiny-imagenet", drop("val/images/val_1.JPEG"), r"val_1\.JPEG"),
    ("annotations odd", "tiny-imagenet", put("val/val_annotations.txt", b"val_0.JPEG n1\n"), "annotations.txt:1"),
    ("annotations binary", "tiny-imagenet", put("val/val_annotations.txt", b"\xff\xfe"), "val_annotations.txt"),
    ("annotations empty", "tiny-imagenet", put("val/val_annotations.txt", b"a.JPEG\tn9\n"), "no image of the 2"),
    ("class missing", "tiny-imagenet", put("wnids.txt", b"n1\nn5\n"), "n5.images"),
    ("image size", "folder", lambda root: write_image(root / "train" / "dog" / "x.png", 9), r"9x9 at .*dog.x\.png"),
    ("test image size", "folder", lambda root: write_image(root / "test" / "dog" / "x.png", 9), r"test.dog.x\.png"),
    ("unreadable", "folder", put("train/cat/x.png", b"not an image"), r"cat.x\.png"),
    ("new test class", "folder", lambda root: write_image(root / "test" / "emu" / "x.png"), "class emu"),
    ("empty class", "folder", lambda root: (root / "train" / "emu").mkdir(), "no image at .*emu"),
]


@pytest.mark.parametrize(("name", "damage", "match"), [c[1:] for c in MUST_FAIL], ids=[c[0] for c in MUST_FAIL])
def test_damaged_data_fail(tmp_path: Path, name: str, damage: Callable[[Path], object], match: str) -> None:
    WRITERS[name](tmp_path)
    damage(tmp_path)
    with pytest.raises(ShoalError, match=match) as caught:
        load(name, tmp_path)
    assert re.match("(?s)found .* at .*; need .*; ", str(caught.value))


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "folder"])
def test_missing_data_say_where_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(ShoalError, match=f"no {name} data at {tmp_path}; need .*(fetch|install).*--data-dir"):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("cifar", {}, "did you mean cifar10"),
        ("Fashion_MNIST", {}, "did you mean fashion-mnist"),
        ("", {}, "need one of digits, fashion-mnist"),
        ("/nowhere", {}, "'/nowhere' at data set name"),
        (".", {"root": "."}, "no root"),
        ("folder", {}, "no data set folder"),
        ("folder", {"root": "/nowhere"}, "no class folder at /nowhere"),
        ("digits", {"val": 1.0}, "1.0 at val"),
        ("digits", {"val": -0.1}, "-0.1 at val"),
        ("digits", {"val": float("nan")}, "nan at val"),
        ("digits", {"limit": 0}, "0 at limit"),
        ("digits", {"size": 0}, "0 at size"),
    ],
)
def test_bad_arguments_fail(name: str, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ShoalError, match=match):
        load(name, **arguments)


def test_two_images_are_too_few_for_a_test_split(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "a.png")
    write_image(tmp_path / "dog" / "a.png")
    with pytest.raises(ShoalError, match="test split"):
        load("folder", tmp_path)


# ---- fuzz: a valid split or ShoalError, nothing else


def flipped(raw: bytes, flips: list[tuple[int, int]]) -> bytes:
    damaged = bytearray(raw)
    for position, bits in flips:
        damaged[position % len(damaged)] ^= bits
    return bytes(damaged)


def valid_or_refused(read: Callable[[bytes], tuple[torch.Tensor, torch.Tensor]], raw: bytes) -> None:
    try:
        pair = read(raw)
    except ShoalError as error:
        assert str(error).startswith("found ")  # noqa: PT017 - either outcome is right
    else:
        check_split(pair, 10)


GOOD_IDX = idx(pixels(2, 28, 28))
GOOD_BATCHES = [cifar_batch(2, b"labels", protocol=protocol) for protocol in (0, 2, 4)]
FLIPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)
# The pixels are most of a file and any value is good there; the structure is in the ends.
ENDS = st.lists(st.tuples(st.integers(-140, 160), st.integers(1, 255)), min_size=1, max_size=4)


def read_images(raw: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    return readers.parse_idx_pair(raw, idx(np.zeros(2, np.uint8)), 10, 28, "fuzz")


def read_labels(raw: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    return readers.parse_idx_pair(GOOD_IDX, raw, 10, 28, "fuzz")


def read_batch(raw: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    return cifar.parse_cifar(raw, b"labels", 10, "fuzz")


READS = [read_images, read_labels, read_batch]


@FAST
@given(st.sampled_from(READS), st.sampled_from([b"", *(b[:60] for b in GOOD_BATCHES), GOOD_IDX[:4]]), st.binary())
@example(read_batch, b"", b"\x80\x02Nr\xff\xff\xff\x7f.")  # a memo slot of 32 GiB for the C unpickler
@example(read_batch, b"", b"\x80\x05\x96" + (1 << 34).to_bytes(8, "little") + b".")  # a bytearray of 16 GiB
@example(read_batch, b"", b"\x80\x02" + b"(" * 50000 + b"t" * 50000 + b".")
@example(read_batch, b"", b"\x80\x02K\x00" + b"\x85" * 50000 + b"}\x86R.")
@example(read_images, b"", struct.pack(">4I", 0x803, 0, 28, 28))
@example(read_images, b"", struct.pack(">4I", 0x803, 0, 2**32 - 1, 2**32 - 1))
@example(read_images, b"", struct.pack(">4I", 0x803, *[2**32 - 1] * 3))
def test_random_bytes(read: Callable[..., tuple[torch.Tensor, torch.Tensor]], start: bytes, tail: bytes) -> None:
    valid_or_refused(read, start + tail)


@FAST
@given(st.integers(0, len(GOOD_IDX)), FLIPS)
def test_damaged_idx(keep: int, flips: list[tuple[int, int]]) -> None:
    valid_or_refused(read_images, GOOD_IDX[:keep])
    valid_or_refused(read_images, flipped(GOOD_IDX, flips))
    valid_or_refused(read_images, flipped(GOOD_IDX, [(at % 16, bits) for at, bits in flips]))
    valid_or_refused(read_labels, flipped(idx(np.zeros(2, np.uint8)), flips))


@FAST
@given(st.sampled_from(GOOD_BATCHES), st.integers(0, 10**6), FLIPS, ENDS)
def test_damaged_cifar(raw: bytes, keep: int, flips: list[tuple[int, int]], ends: list[tuple[int, int]]) -> None:
    valid_or_refused(read_batch, raw[: keep % len(raw)])
    valid_or_refused(read_batch, flipped(raw, flips))
    valid_or_refused(read_batch, flipped(raw, ends))


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [os.mkdir, eval, np.load, np.frombuffer, getattr, __import__])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, protocol: int, function: Callable[..., object]) -> None:
    target = tmp_path / "made"
    argument = f"__import__('os').mkdir({str(target)!r})" if function is eval else str(target)
    write_cifar(tmp_path, "cifar100")
    raw = pickle.dumps({b"data": Call(function, argument), b"fine_labels": [0]}, protocol)
    (tmp_path / C100 / "train").write_bytes(raw)
    with pytest.raises(ShoalError, match=r"found a call of .* at .*train"):
        load("cifar100", tmp_path)
    assert not target.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x02cnumpy\ndtype\n}U\x08__call__Nsb.",  # instance state for a stand-in
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}U\x09__class__Ns\x86b.",  # and slot state
        b"\x80\x02c_codecs\nencode\nX\x04\x00\x00\x00aaaaX\x03\x00\x00\x00hex\x86R.",  # another codec
    ],
)
def test_a_pickle_cannot_misuse_the_stand_ins(raw: bytes) -> None:
    with pytest.raises(ShoalError):
        cifar.unpickle(raw, "file")
    read_batch(GOOD_BATCHES[1])
