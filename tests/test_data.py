"""Readers of published layouts, splits and augmentation. Each test writes the little data that it reads."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import re
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from shoal import data as data_module
from shoal import readers
from shoal.data import NAMES, POLICIES, Dataset, Split, augment_batch, batches, load, stratified_order
from shoal.errors import ShoalError

RNG = np.random.default_rng(0)
FAST = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- writers of the published layouts


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder: Path, count: int = 40, suffix: str = "") -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = pixels(count, 28, 28)
    for prefix in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", (np.arange(count) % 10).astype(np.uint8))):
            raw = idx(array)
            path = folder / f"{prefix}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(raw, 1) if suffix else raw)
    return images


def cifar_batch(count: int, key: bytes, classes: int = 10, protocol: int = 2) -> bytes:
    labels = [i % classes for i in range(count)]
    names = [f"image_{i}.png".encode() for i in range(count)]
    return pickle.dumps({b"data": pixels(count, 3072), key: labels, b"filenames": names}, protocol)


def cifar_files(name: str, count: int = 20) -> dict[str, bytes]:
    if name == "cifar10":
        parts = [f"data_batch_{i}" for i in range(1, 6)]
        return {part: cifar_batch(count, b"labels") for part in [*parts, "test_batch"]}
    return {part: cifar_batch(count * 5, b"fine_labels", 100) for part in ("train", "test")}


CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def write_cifar(root: Path, name: str) -> Path:
    folder = root / CIFAR_FOLDERS[name]
    folder.mkdir(parents=True)
    for part, raw in cifar_files(name).items():
        (folder / part).write_bytes(raw)
    return folder


def write_archive(root: Path, name: str) -> Path:
    path = root / f"{name.replace('cifar', 'cifar-')}-python.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for part, raw in cifar_files(name).items():
            member = tarfile.TarInfo(f"{CIFAR_FOLDERS[name]}/{part}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def write_svhn(folder: Path, **changed: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"X": pixels(32, 32, 3, 30), "y": (np.arange(30) % 10 + 1).astype(np.uint8)[:, None]}
    for part in ("train", "test"):
        savemat(folder / f"{part}_32x32.mat", {**content, **changed}, do_compression=True)


def write_image(path: Path, side: int = 8, level: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(side, side, 3) if level is None else np.full((side, side, 3), level, np.uint8)).save(path)


def write_tiny(folder: Path, wnids: tuple[str, ...] = ("n2", "n1")) -> None:
    for wnid in (*wnids, "n9"):  # n9 stands for a class that wnids.txt leaves out
        for i in range(10):
            write_image(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", level=int(wnid[1:]) * 20)
    lines = []
    for i, wnid in enumerate((*wnids, "n9") * 2):
        write_image(folder / "val" / "images" / f"val_{i}.JPEG", level=int(wnid[1:]) * 20)
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t7\t7\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))


def write_folder(root: Path, parts: tuple[str, ...] = ("train", "test")) -> None:
    for part in parts:
        for level, name in ((0, "cat"), (200, "dog")):
            for i in range(10):
                write_image(root / part / name / f"{i}.png", level=level)


# ---- every layout loads


def check(data: Dataset, train: int, val: int, test: int, shape: tuple[int, int, int], classes: int) -> None:
    assert [len(s) for s in (data.train, data.val, data.test)] == [train, val, test]
    assert data.shape == shape
    assert data.classes == classes
    assert len(data.mean) == len(data.std) == shape[0]
    for split in (data.train, data.val, data.test):
        assert split.images.shape[1:] == shape
        check_split((split.images, split.labels), classes)


def check_split(pair: tuple[torch.Tensor, torch.Tensor], classes: int) -> None:
    images, labels = pair
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert len(images) == len(labels)
    assert images.ndim == 4
    assert not len(labels) or 0 <= labels.min() <= labels.max() < classes


def test_digits() -> None:
    data = load("digits")
    check(data, 1132, 126, 539, (1, 16, 16), 10)
    assert data.augment == "none"
    assert data.train.images.max() > 240
    again = load("digits", seed=1)
    assert torch.equal(again.test.images, data.test.images)
    assert not torch.equal(again.val.images, data.val.images)
    assert load("digits", size=8).shape == (1, 8, 8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inner", ["", "fashion-mnist"])
def test_fashion(tmp_path: Path, suffix: str, inner: str) -> None:
    written = write_fashion(tmp_path / inner, suffix=suffix)
    data = load("fashion-mnist", tmp_path, val=0)
    check(data, 40, 0, 40, (1, 32, 32), 10)
    assert np.array_equal(data.train.images[:, 0, 2:30, 2:30].numpy(), written)
    assert data.train.images[:, :, :2].sum() == 0
    assert load("fashion-mnist", tmp_path, size=16).shape == (1, 16, 16)


@pytest.mark.parametrize(("name", "counts"), [("cifar10", (90, 10, 20)), ("cifar100", (90, 10, 100))])
def test_cifar_folder(tmp_path: Path, name: str, counts: tuple[int, int, int]) -> None:
    folder = write_cifar(tmp_path, name)
    data = load(name, tmp_path)
    check(data, *counts, (3, 32, 32), {"cifar10": 10, "cifar100": 100}[name])
    assert data.augment == "crop-flip"
    assert torch.equal(load(name, folder).train.images, data.train.images)


def test_cifar_pixels_are_planes_of_rows(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, "cifar100")
    raw = pickle.loads((folder / "test").read_bytes())[b"data"]
    image = load("cifar100", tmp_path).test.images[3].numpy()
    assert image[2, 5, 7] == raw[3, 2 * 1024 + 5 * 32 + 7]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = write_archive(tmp_path, name)
    with pytest.raises(ShoalError, match="MD5"):
        load(name, tmp_path)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(data_module._CIFAR, name, replace(data_module._CIFAR[name], md5=md5))
    check(load(name, tmp_path), 90, 10, {"cifar10": 20, "cifar100": 100}[name], (3, 32, 32), int(name[5:]))
    assert list(tmp_path.iterdir()) == [path]


def test_cifar_written_by_python_2() -> None:
    """Python 2's strings are the bytes of the published files: the opcodes differ from Python 3's protocol 2."""
    row = bytes(range(256)) * 12
    raw = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85"
        b"U\x01b\x87Rq\x05(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + row + b"tbU\x06labelsq\x08]q\tK\x07au."
    )
    images, labels = readers.parse_cifar(raw, b"labels", 10, "batch")
    assert images.numpy().tobytes() == row
    assert labels.tolist() == [7]


@pytest.mark.parametrize("inner", ["", "svhn"])
def test_svhn(tmp_path: Path, inner: str) -> None:
    write_svhn(tmp_path / inner)
    data = load("svhn", tmp_path, val=0.2)
    check(data, 24, 6, 30, (3, 32, 32), 10)
    assert data.test.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_tiny_imagenet(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny-imagenet-200")
    data = load("tiny-imagenet", tmp_path)
    check(data, 18, 2, 4, (3, 8, 8), 2)
    # Labels follow the sorted ids, whatever the order of wnids.txt; level 20 is class n1.
    assert torch.equal((data.test.images[:, 0, 0, 0] > 30).long(), data.test.labels)
    assert load("tiny-imagenet", tmp_path / "tiny-imagenet-200", size=4).shape == (3, 4, 4)


def test_folder_with_a_test_part(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = load(str(tmp_path), limit=6)
    check(data, 6, 2, 20, (3, 8, 8), 2)
    assert torch.equal((data.test.images[:, 0, 0, 0] > 100).long(), data.test.labels)
    assert data.train.labels.bincount().tolist() == [3, 3]


def test_folder_whose_test_part_lacks_a_class_keeps_the_labels(tmp_path: Path) -> None:
    write_folder(tmp_path, ("train",))
    write_image(tmp_path / "test" / "dog" / "a.png")
    assert load("folder", tmp_path).test.labels.tolist() == [1]


def test_folder_without_a_test_part(tmp_path: Path) -> None:
    write_folder(tmp_path, ("",))
    check(load("folder", tmp_path), 14, 2, 4, (3, 8, 8), 2)


def test_folder_with_a_class_called_train(tmp_path: Path) -> None:
    for name in ("train", "tram"):
        for i in range(5):
            write_image(tmp_path / name / f"{i}.jpg")
    assert load("folder", tmp_path, val=0).classes == 2


def test_folder_resizes_unequal_images(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_image(tmp_path / "train" / "cat" / "odd.png", side=9)
    assert load("folder", tmp_path, size=8).shape == (3, 8, 8)


def test_default_roots_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path / "svhn")
    monkeypatch.setattr(data_module, "DEFAULT_ROOTS", (tmp_path / "none", tmp_path))
    assert len(load("svhn").test) == 30


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
C10, C100 = "cifar-10-batches-py", "cifar-100-python"
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
    ("label range", "cifar10", put(f"{C10}/test_batch", batch_of(data=ZEROS, labels=[0, 10])), "odd labels.*test_b"),
    ("label type", "cifar10", put(f"{C10}/test_batch", batch_of(data=ZEROS, labels=[0, "1"])), "odd labels.*test_b"),
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

WRITERS: dict[str, Callable[[Path], object]] = {
    "fashion-mnist": write_fashion,
    "cifar10": lambda root: write_cifar(root, "cifar10"),
    "cifar100": lambda root: write_cifar(root, "cifar100"),
    "svhn": write_svhn,
    "tiny-imagenet": write_tiny,
    "folder": write_folder,
}


@pytest.mark.parametrize(("name", "damage", "match"), [c[1:] for c in MUST_FAIL], ids=[c[0] for c in MUST_FAIL])
def test_damaged_data_fail(tmp_path: Path, name: str, damage: Callable[[Path], object], match: str) -> None:
    WRITERS[name](tmp_path)
    damage(tmp_path)
    with pytest.raises(ShoalError, match=match) as caught:
        load(name, tmp_path)
    assert re.match("(?s)found .* at .*; need .*; ", str(caught.value))


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "folder"])
def test_missing_data_say_where_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(ShoalError, match=f"no {name} data at {tmp_path}; need .*(fetch|install).*root="):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("cifar", {}, "did you mean cifar10"),
        ("Fashion_MNIST", {}, "did you mean fashion-mnist"),
        ("", {}, "need one of digits, fashion-mnist"),
        ("/nowhere", {}, "'/nowhere' at data set name"),
        (".", {"root": "."}, "no root"),
        ("folder", {}, "no root at"),
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
    return readers.parse_cifar(raw, b"labels", 10, "fuzz")


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
        readers.unpickle(raw, "file")
    read_batch(GOOD_BATCHES[1])


# ---- splits


def keys(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_train_and_val_are_disjoint_deterministic_and_follow_the_seed(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar100")
    one, same, other = (load("cifar100", tmp_path, val=0.2, seed=seed) for seed in (0, 0, 1))
    whole = load("cifar100", tmp_path, val=0)
    assert not keys(one.train) & keys(one.val)
    assert keys(one.train) | keys(one.val) == keys(whole.train)
    assert torch.equal(one.val.images, same.val.images)
    assert keys(one.val) != keys(other.val)


def test_limit_keeps_the_validation_split(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10")
    whole, few = load("cifar10", tmp_path), load("cifar10", tmp_path, limit=30)
    assert torch.equal(whole.val.images, few.val.images)
    assert keys(few.train) < keys(whole.train)
    assert few.train.labels.bincount().tolist() == [3] * 10


@FAST
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 2**31), st.data())
def test_every_prefix_of_the_order_is_stratified(labels: list[int], seed: int, draw: st.DataObject) -> None:
    every = torch.tensor(labels)
    order = stratified_order(every, seed)
    assert order.sort().values.tolist() == list(range(len(labels)))
    size = draw.draw(st.integers(0, len(labels)))
    share = every.bincount() * (size / len(labels))
    counts = every[order[:size]].bincount(minlength=len(share))
    assert (counts - share).abs().max() <= 1.0 + len(share) * 0.1


def test_take_and_to() -> None:
    split = Split(torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1), torch.arange(5))
    assert split.take([4, 0]).labels.tolist() == [4, 0]
    assert split.take(torch.tensor([2])).images.item() == 2
    assert len(split.take([])) == 0
    assert split.to("meta").images.device.type == split.to("meta").labels.device.type == "meta"


def test_normalise_and_moments() -> None:
    data = load("digits")
    normal = data.normalise(data.train.images)
    assert normal.dtype == torch.float32
    assert normal.mean().abs() < 1e-4
    assert (normal.std() - 1).abs() < 1e-3
    published = replace(data, mean=(0.5, 0.0), std=(0.25, 1.0))
    images = torch.tensor([255, 51], dtype=torch.uint8).reshape(1, 2, 1, 1)
    torch.testing.assert_close(published.normalise(images).flatten(), torch.tensor([2.0, 0.2]))
    assert data.to("meta").val.images.device.type == "meta"


def test_a_constant_channel_normalises_to_finite_values(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(5):
            write_image(tmp_path / name / f"{i}.png", level=7)
    data = load("folder", tmp_path)
    assert data.normalise(data.train.images).isfinite().all()


# ---- augmentation


PICTURES = torch.randint(1, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=seeded())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (4, 1, 16, 24), (3, 2, 4, 4), (2, 1, 1, 1), (0, 3, 8, 8)])
def test_augmentation_keeps_shape_and_type_and_follows_the_generator(
    policy: str, shape: tuple[int, int, int, int]
) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded())
    before = images.clone()
    one, two = (augment_batch(images, policy, seeded(7)) for _ in range(2))
    assert one.shape == images.shape
    assert one.dtype == torch.uint8
    assert torch.equal(one, two)
    assert torch.equal(images, before)


def test_none_is_the_identity_and_draws_nothing() -> None:
    generator = seeded()
    state = generator.get_state()
    assert torch.equal(augment_batch(PICTURES, "none", generator), PICTURES)
    assert torch.equal(generator.get_state(), state)


def shifts(image: torch.Tensor, pad: int) -> list[torch.Tensor]:
    _, height, width = image.shape
    padded = torch.nn.functional.pad(image, (pad, pad, pad, pad))
    steps = range(2 * pad + 1)
    return [padded[:, y : y + height, x : x + width] for y in steps for x in steps]


def test_crop_shifts_each_image_by_its_own_draw() -> None:
    out = augment_batch(PICTURES, "crop", seeded())
    generator = seeded()
    rows, columns = (torch.randint(5, (64,), generator=generator) for _ in range(2))
    for i in range(64):
        assert torch.equal(out[i], shifts(PICTURES[i], 2)[int(rows[i] * 5 + columns[i])])
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) > 10


def test_flip_mirrors_about_half_of_the_images() -> None:
    cropped = augment_batch(PICTURES, "crop", seeded())
    out = augment_batch(PICTURES, "crop-flip", seeded())
    mirrored = [torch.equal(b, a.flip(2)) for a, b in zip(cropped, out, strict=True)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, cropped, out, strict=True))
    assert 16 < sum(mirrored) < 48


def test_cutout_zeroes_one_square() -> None:
    plain = augment_batch(PICTURES, "crop-flip", seeded())
    out = augment_batch(PICTURES, "crop-flip-cutout", seeded())
    lost = plain != out
    assert (out[lost] == 0).all()
    assert lost.any(1).sum((1, 2)).max() <= 16
    assert lost.flatten(1).any(1).float().mean() > 0.8
    heights = lost.any(1).any(2).sum(1)
    assert heights.max() == 4


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_cover_the_split_once(shuffle: bool) -> None:
    split = Split(PICTURES, torch.arange(64))
    drawn = list(batches(split, 10, generator=seeded(), augment="none", shuffle=shuffle))
    assert [len(labels) for _, labels in drawn] == [10] * 6 + [4]
    labels = torch.cat([labels for _, labels in drawn])
    assert torch.equal(torch.cat([images for images, _ in drawn]), PICTURES[labels])
    assert torch.equal(labels.sort().values, torch.arange(64))
    assert torch.equal(labels, torch.arange(64)) is not shuffle


def test_batches_of_an_empty_split_are_none() -> None:
    split = Split(PICTURES[:0], torch.arange(0))
    assert not list(batches(split, 10, generator=seeded(), augment="crop", shuffle=True))


def test_batches_and_policies_refuse_bad_arguments_at_once() -> None:
    split = Split(PICTURES, torch.arange(64))
    with pytest.raises(ShoalError, match="0 at batch_size"):
        batches(split, 0, generator=seeded(), augment="none", shuffle=False)
    with pytest.raises(ShoalError, match="'mixup' at augment; need one of none, crop"):
        batches(split, 1, generator=seeded(), augment="mixup", shuffle=False)
    with pytest.raises(ShoalError, match="at augment"):
        augment_batch(PICTURES, "flip", seeded())


def test_every_name_is_known_to_the_loader(tmp_path: Path) -> None:
    assert {*WRITERS, "digits"} == set(NAMES)
