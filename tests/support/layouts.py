"""Small data sets in their published layouts, written by the tests that read them."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from shoal.data.dataset import Dataset

RNG = np.random.default_rng(0)
C10, C100 = "cifar-10-batches-py", "cifar-100-python"


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


WRITERS: dict[str, Callable[[Path], object]] = {
    "fashion-mnist": write_fashion,
    "cifar10": lambda root: write_cifar(root, "cifar10"),
    "cifar100": lambda root: write_cifar(root, "cifar100"),
    "svhn": write_svhn,
    "tiny-imagenet": write_tiny,
    "folder": write_folder,
}
