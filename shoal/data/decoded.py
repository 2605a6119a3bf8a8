"""A folder of decoded images, so that a set of image files is decoded once and then read batch by batch.

The folder has `images.npy` (uint8 [N, C, H, W]) and `index.json`, which says from which files it was made. While it is
made, it has `images.part` and `progress.json`; decoding goes on from there after a stop. Both names of a finished
folder appear only when all images are on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shoal.data.images import Frame
from shoal.data.mapped import MappedImages
from shoal.errors import ShoalError
from shoal.progress import counter, say

Moments = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel."""

FORMAT = 1
"""Number of the layout of these folders."""
CHUNK, CHUNK_BYTES = 256, 1 << 24
"""Most images, and most bytes, that are decoded before they are written."""
SAVE_SECONDS = 20.0
"""Seconds of decoding that a kill or a power cut can cost."""
GB = 1e9


@dataclass(frozen=True)
class Source:
    """Image files below `root`, and how they become images of one size."""

    root: Path
    paths: Sequence[Path]
    frame: Frame

    def folder(self, cache: Path) -> Path:
        """The folder in `cache` for these files: one for each root, size, rule and number of channels."""
        text = f"{self.root.absolute()}:{self.frame.channels}:{self.frame.size}:{self.frame.fit}"
        return cache / f"{self.root.absolute().name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def line(self, path: Path) -> bytes:
        """Name, size and time of change of one file. Raises ShoalError when it is missing."""
        try:
            facts = path.stat()
        except OSError as error:
            raise ShoalError(
                f"found no readable image at {path} ({error}); need every file of the set; fetch it again"
            ) from error
        return f"{path.relative_to(self.root)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode()

    def fingerprint(self, count: int) -> Fingerprint:
        """The fingerprint of the first `count` files."""
        return Fingerprint(self).add(self.paths[:count])


class Fingerprint:
    """SHA-256 of names, sizes and times of change of the files of `source` that were added."""

    def __init__(self, source: Source) -> None:
        self.source, self.hasher = source, hashlib.sha256()

    def add(self, paths: Sequence[Path]) -> Fingerprint:
        """Add files, in their order; returns this object. Raises ShoalError when one is missing."""
        for path in paths:
            self.hasher.update(self.source.line(path))
        return self

    def __str__(self) -> str:
        return self.hasher.hexdigest()


# ---- decoding


def decode(source: Source, shape: tuple[int, ...], start: int = 0) -> Iterator[np.ndarray]:
    """The images of `source` from number `start` on, in order, as uint8 [M, C, H, W] with the `shape` (C, H, W).

    Raises ShoalError, naming the first file that is unreadable or has another size.
    """
    frame, count = source.frame, max(1, min(CHUNK, CHUNK_BYTES // math.prod(shape)))
    # Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor() as pool:
        for first in range(start, len(source.paths), count):
            part = source.paths[first : first + count]
            images = np.empty((len(part), *shape), np.uint8)
            for index, image in enumerate(pool.map(frame.read, part)):
                if image.shape != shape:
                    raise ShoalError(
                        f"found an image of {image.shape[2]}x{image.shape[1]} at {part[index]}; need "
                        f"{shape[2]}x{shape[1]} like {source.paths[0].name}; resize it, or give --size (size=) to "
                        "resize all"
                    )
                images[index] = image
            yield images


# ---- folders of decoded images


def decoded(source: Source, cache: Path) -> MappedImages:
    """The images of `source`, read from a folder in `cache`, which is made first if there is none.

    A second process waits until the first has made the folder. Raises ShoalError when the files are not those that the
    folder was made from, an image cannot be decoded, or the disk is too small.
    """
    folder = source.folder(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not (folder / "index.json").exists() or not (folder / "images.npy").exists():
                _make(source, folder)
            else:
                _check_index(source, folder)
        return _opened(folder, len(source.paths))
    except OSError as error:
        raise ShoalError(
            f"found that {folder} cannot be used for decoded images ({error}); need a writable folder with enough free "
            "space; make room or give --cache (cache=) another folder; what was decoded is kept"
        ) from error


def _check_index(source: Source, folder: Path) -> None:
    known, count = _json(folder / "index.json"), len(source.paths)
    if known.get("format") != FORMAT or known.get("fingerprint") != str(source.fingerprint(count)):
        raise ShoalError(
            f"found other image files at {source.root} than {folder} was decoded from ({known.get('images')} images "
            f"then, {count} now; a name, a size or a time of change differs); need the same; restore them, or delete "
            f"{folder} to decode them anew"
        )


def _opened(folder: Path, count: int) -> MappedImages:
    path = folder / "images.npy"
    try:
        images = MappedImages(path)
        if len(images) != count:
            raise ValueError(f"{len(images)} images, not {count}")
    except (ValueError, EOFError) as error:
        raise ShoalError(
            f"found damaged decoded images at {path} ({error}); need the file whole; delete {folder} to "
            "decode them anew"
        ) from error
    return images


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder; the system lets go of it when the process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process decodes images into {folder}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# ---- making such a folder


def _make(source: Source, folder: Path) -> None:
    """Decode all files into `folder`, from where an earlier process stopped."""
    first, count = source.frame.read(source.paths[0]), len(source.paths)
    done, part = _resumed(source, folder, first.shape), folder / "images.part"
    _check_space(folder, count * first.nbytes, part.stat().st_size if part.exists() else 0)
    channels, height, width = first.shape
    say(
        f"{source.root}: {count:,} images are decoded once, as uint8 {channels}x{height}x{width}, into {folder} "
        f"({count * first.nbytes / GB:,.1f} GB)" + (f"; {done:,} are there already" if done else "")
    )
    with part.open("r+b" if done else "wb") as file:
        fingerprint, frame = _write(source, folder, file, first, done), source.frame
    facts: dict[str, Any] = {
        "root": str(source.root.absolute()),
        "size": frame.size,
        "fit": frame.fit,
        "channels": frame.channels,
    }
    facts |= {"format": FORMAT, "images": count, "shape": first.shape, "fingerprint": fingerprint}
    _write_json(folder / "index.json", facts)
    os.replace(part, folder / "images.npy")
    (folder / "progress.json").unlink(missing_ok=True)


def _resumed(source: Source, folder: Path, shape: tuple[int, ...]) -> int:
    """Number of images that are on the disk and whose files have not changed since."""
    if not (folder / "progress.json").exists() or not (folder / "images.part").exists():
        return 0
    known = _json(folder / "progress.json")
    done = known.get("done")
    if not isinstance(done, int) or not 0 <= done <= len(source.paths) or known.get("shape") != list(shape):
        return 0
    return done if known.get("fingerprint") == str(source.fingerprint(done)) else 0


def _check_space(folder: Path, need: int, there: int) -> None:
    free = shutil.disk_usage(folder).free + there
    if free < need:
        raise ShoalError(
            f"found {free / GB:,.1f} GB of free space at {folder}; need {need / GB:,.1f} GB for the decoded images; "
            "make room, give --cache (cache=) a folder on a larger disk, or a smaller --size (size=)"
        )


def _write(source: Source, folder: Path, file: BinaryIO, first: np.ndarray, done: int) -> str:
    """Write the header and the images from `done` on; returns the fingerprint of all files.

    What was decoded before an error stays, and counts when decoding goes on.
    """
    count, saved, fingerprint = len(source.paths), time.monotonic(), source.fingerprint(done)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape)}
    np.lib.format.write_array_header_1_0(file, header)  # as long for any number of images: a multiple of 64 bytes
    file.seek(done * first.nbytes, os.SEEK_CUR)
    file.truncate()

    def save() -> None:
        file.flush()
        os.fsync(file.fileno())
        _write_json(folder / "progress.json", {"done": done, "shape": first.shape, "fingerprint": str(fingerprint)})

    with counter("decoded images", count, done) as advance:
        try:
            for images in decode(source, first.shape, done):
                file.write(images.data)
                fingerprint.add(source.paths[done : done + len(images)])
                done += len(images)
                advance(done, count)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        finally:
            save()
    return str(fingerprint)


# ---- what is computed from all pixels


def remembered(images: MappedImages, compute: Callable[[], Moments]) -> Moments:
    """The result of `compute` for exactly these images, from a file beside them if an earlier process left it."""
    digest = hashlib.sha256(images.rows.numpy().astype("<i8").tobytes()).hexdigest()[:16]
    path = images.path.with_name(f"moments-{digest}.json")
    known = _json(path) if path.exists() else {}
    if "mean" in known and "std" in known:
        return tuple(known["mean"]), tuple(known["std"])
    mean, std = compute()
    with suppress(OSError):  # others may read a folder that they cannot write to
        _write_json(path, {"mean": mean, "std": std})
    return mean, std


# ---- JSON files


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if it is damaged."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, body: dict[str, Any]) -> None:
    """Write a file so that it has either the old or the whole new content."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w") as file:
        json.dump(body, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
