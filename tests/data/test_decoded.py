"""Decoded images in a file: the batches are those from memory, made once, in bounded memory, never of other files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shoal.data import decoded, folders
from shoal.data.dataset import Dataset, batches
from shoal.data.images import Frame
from shoal.data.loading import load
from shoal.data.mapped import MappedImages
from shoal.errors import ShoalError
from shoal.models import build
from shoal.training.evaluation import evaluate
from shoal.training.loop import fit
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.support.layouts import seeded, write_folder, write_image, write_tiny

SPLITS = ("train", "val", "test")


def both(folder: Path, cache: Path, kind: str = "folder", **more: object) -> tuple[Dataset, Dataset]:
    """The set in memory and the set in a file."""
    return load(kind, folder, **more), load(kind, folder, cache=cache, **more)  # type: ignore[arg-type]


def same(one: Dataset, other: Dataset) -> None:
    assert one.fingerprint() == other.fingerprint()
    assert (one.mean, one.std, one.classes, one.class_names) == (
        other.mean,
        other.std,
        other.classes,
        other.class_names,
    )
    for part in SPLITS:
        left, right = getattr(one, part), getattr(other, part)
        assert isinstance(right.images, MappedImages)
        assert right.images.shape == left.images.shape
        assert torch.equal(left.labels, right.labels)
        assert torch.equal(left.images, right.images[:])


def only(cache: Path) -> Path:
    """The one folder of decoded images in `cache`."""
    (folder,) = cache.iterdir()
    return folder


@pytest.mark.parametrize(
    ("parts", "more"),
    [
        (("train", "test"), {"val": 0.3, "seed": 5}),
        (("train", "test", "val"), {}),
        (("train", "val"), {"limit": 7}),
        (("",), {"size": (6, 5), "fit": "crop", "channels": 1}),
    ],
)
def test_splits_and_moments_are_those_from_memory(
    tmp_path: Path, parts: tuple[str, ...], more: dict[str, object]
) -> None:
    write_folder(tmp_path / "set", parts)
    for _ in range(2):  # made, then found
        same(*both(tmp_path / "set", tmp_path / "cache", **more))


def test_tiny_imagenet_can_be_decoded_into_a_file(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    same(*both(tmp_path / "tiny", tmp_path / "cache", "tiny-imagenet"))


def test_training_and_evaluation_are_bit_equal_to_memory(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", ("train", "test"))
    found = []
    for data in both(tmp_path / "set", tmp_path / "cache", val=0.2):
        torch.manual_seed(0)
        net = build("resnet10", 2, width=0.05)
        settings, schedule = Settings(seed=3, augment="crop-flip"), Schedule(2, 0.05, batch_size=4)
        fit(net, data, Objective((cross_entropy(),)), schedule, settings=settings)
        drawn = batches(data.train, 5, generator=seeded(), augment="crop-flip-cutout", shuffle=True)
        found.append((net.state_dict(), evaluate(net, data, data.test), list(drawn)))
    (weights, accuracy, drawn), (others, other_accuracy, other_drawn) = found
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert accuracy == other_accuracy
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(drawn, other_drawn, strict=True))


def test_files_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "set", ("train", "test"))
    load("folder", tmp_path / "set", cache=tmp_path / "cache")
    reads: list[Path] = []
    monkeypatch.setattr(Frame, "read", lambda frame, path: reads.append(path) or read(frame, path))
    load("folder", tmp_path / "set", cache=tmp_path / "cache")
    assert reads == []


read = Frame.read


def test_large_sets_go_to_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "set", ("train", "test"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert isinstance(load("folder", tmp_path / "set").train.images, torch.Tensor)
    monkeypatch.setattr(folders, "memory", lambda: 2 * 40 * 3 * 8 * 8 - 2)
    assert isinstance(load("folder", tmp_path / "set").train.images, MappedImages)
    assert (only(tmp_path / "home" / "shoal" / "images") / "images.npy").exists()


# ---- stops and faults


def test_decoding_goes_on_after_a_fault_without_repeating_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "set", tmp_path / "cache"
    write_folder(folder, ("train", "test"))
    damaged = sorted((folder / "test" / "cat").iterdir())[3]
    good = damaged.read_bytes()
    damaged.write_bytes(good[:40])
    monkeypatch.setattr(decoded, "CHUNK", 4)
    with pytest.raises(ShoalError, match=f"found no readable image at {damaged}"):
        load("folder", folder, cache=cache)
    assert json.loads((only(cache) / "progress.json").read_text())["done"] == 20
    damaged.write_bytes(good)
    reads: list[Path] = []
    monkeypatch.setattr(Frame, "read", lambda frame, path: reads.append(path) or read(frame, path))
    data = load("folder", folder, cache=cache)
    assert len(reads) == 1 + 20  # the first image gives the shape
    assert sorted(path.name for path in only(cache).glob("*.*") if "moments" not in path.name) == [
        "images.npy",
        "index.json",
    ]
    monkeypatch.setattr(Frame, "read", read)
    same(load("folder", folder), data)


def test_images_that_changed_before_decoding_went_on_are_decoded_again(tmp_path: Path) -> None:
    folder, cache = tmp_path / "set", tmp_path / "cache"
    write_folder(folder, ("train", "test"))
    damaged = sorted((folder / "test" / "dog").iterdir())[-1]
    good = damaged.read_bytes()
    damaged.write_bytes(b"")
    with pytest.raises(ShoalError, match="found no readable image"):
        load("folder", folder, cache=cache)
    damaged.write_bytes(good)
    write_image(sorted((folder / "train" / "cat").iterdir())[0], level=77)
    same(*both(folder, cache))


KILLED = """
import os, signal, sys
from shoal.data import decoded
from shoal.data.loading import load
decoded.CHUNK, decoded.SAVE_SECONDS, real = 4, 0.0, decoded.decode
def some(*given):
    for number, part in enumerate(real(*given)):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield part
decoded.decode = some
load("folder", sys.argv[1], cache=sys.argv[2])
"""


@pytest.mark.slow  # starts a process that imports torch
def test_a_kill_leaves_no_half_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = tmp_path / "set", tmp_path / "cache"
    write_folder(folder, ("train", "test"))
    ended = subprocess.run([sys.executable, "-c", KILLED, folder, cache], check=False)
    assert ended.returncode == -9
    assert not (only(cache) / "images.npy").exists()
    assert json.loads((only(cache) / "progress.json").read_text())["done"] == 12
    same(*both(folder, cache))


@pytest.mark.parametrize("change", ["added", "removed", "replaced", "touched", "renamed"])
def test_other_files_than_those_decoded_are_refused(tmp_path: Path, change: str) -> None:
    folder, cache = tmp_path / "set", tmp_path / "cache"
    write_folder(folder, ("train", "test"))
    load("folder", folder, cache=cache)
    path = sorted((folder / "train" / "cat").iterdir())[0]
    if change == "added":
        write_image(folder / "train" / "cat" / "new.png", level=3)
    elif change == "removed":
        path.unlink()
    elif change == "replaced":
        write_image(path, level=99)
    elif change == "touched":
        os.utime(path, ns=(0, 0))
    else:
        path.rename(path.with_name("zz.png"))
    with pytest.raises(ShoalError, match=f"found other image files at {folder} than .* was decoded from") as caught:
        load("folder", folder, cache=cache)
    assert f"delete {only(cache)} to decode them anew" in str(caught.value)
    shutil.rmtree(only(cache))
    same(*both(folder, cache))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_a_damaged_file_of_images_is_refused(tmp_path: Path, content: bytes | None) -> None:
    write_folder(tmp_path / "set", ("train", "test"))
    load("folder", tmp_path / "set", cache=tmp_path / "cache")
    path = only(tmp_path / "cache") / "images.npy"
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ShoalError, match=r"found damaged decoded images at .* delete"):
        load("folder", tmp_path / "set", cache=tmp_path / "cache")


def test_the_space_is_checked_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "set", ("train", "test"))
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 7679))
    with pytest.raises(ShoalError, match=r"found 0\.0 GB of free space at .*; need 0\.0 GB for the decoded images"):
        load("folder", tmp_path / "set", cache=tmp_path / "cache")
    assert list(only(tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("digits", None, "found cache .* for digits; need a set of image files"),
        ("folder", None, r"found an image of 9x9 at .*odd.png; need 8x8 like .*png; resize it"),
    ],
)
def test_what_cannot_be_decoded_into_a_file(tmp_path: Path, kind: str, size: int | None, message: str) -> None:
    write_folder(tmp_path / "set", ("train", "test"))
    write_image(tmp_path / "set" / "test" / "dog" / "odd.png", side=9)
    with pytest.raises(ShoalError, match=message):
        load(kind, tmp_path / "set", cache=tmp_path / "cache", size=size)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", ("train", "test"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ShoalError, match=r"cannot be used for decoded images .*; need a writable folder"):
        load("folder", tmp_path / "set", cache=tmp_path / "file")


def test_a_second_process_waits_for_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "set", ("train", "test"))
    load("folder", tmp_path / "set", cache=tmp_path / "cache")
    found: list[Dataset] = []
    second = threading.Thread(target=lambda: found.append(load("folder", tmp_path / "set", cache=tmp_path / "cache")))
    with decoded._locked(only(tmp_path / "cache")):
        second.start()
        second.join(0.2)
        assert not found
    second.join()
    assert len(found) == 1
    assert "waiting for it" in capsys.readouterr().err


# ---- memory

# Data memory is also taken by thread stacks, malloc's arenas and blocks that malloc keeps, which depend on the number
# of cores. So the process acts as on a machine of 64 cores, its threads have small stacks, malloc returns large blocks,
# and a pass over a small set comes first, which makes all threads and buffers.
BOUNDED = """
import os, resource, sys, threading, torch
os.cpu_count = lambda: 64
threading.stack_size(1 << 20)
from shoal.data.loading import load
from shoal.data.dataset import batches
def used():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
def count(data):
    given = batches(data.train, 8, generator=torch.Generator(), augment="crop-flip", shuffle=True)
    return sum(len(images) for images, _ in given)
extra = 128 << 20
assert count(load("folder", sys.argv[2], size=512, cache=sys.argv[4])) == 36
resource.setrlimit(resource.RLIMIT_DATA, (used() + extra, used() + extra))
data = load("folder", sys.argv[1], size=512, cache=sys.argv[3] if sys.argv[3] != "none" else None)
assert data.train.images.shape.numel() > 2 * extra, data.train.images.shape
print(count(data))
"""
FIXED_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "1"}


def write_levels(folder: Path, train: int) -> None:
    """A set of `train` training images and two test images of 8x8, each of one colour."""
    for part, count in (("train", train), ("test", 2)):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for i in range(count // 2):
                pixels = np.full((8, 8, 3), i % 256, np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_a_set_larger_than_the_memory_is_read(tmp_path: Path, cached: bool) -> None:
    write_levels(tmp_path / "set", 400)
    write_levels(tmp_path / "small", 40)
    words = [tmp_path / "set", tmp_path / "small", tmp_path / "cache" if cached else "none", tmp_path / "warm"]
    ended = subprocess.run(
        [sys.executable, "-c", BOUNDED, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | FIXED_MALLOC,
    )
    if cached:
        assert ended.stdout.split() == ["360"], ended.stderr
    else:
        assert "MemoryError" in ended.stderr or "allocate memory" in ended.stderr
