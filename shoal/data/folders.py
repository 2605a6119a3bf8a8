"""Readers of image folders, including Tiny-ImageNet's layout."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from shoal.data.decoded import Source, decode, decoded
from shoal.data.dicom import DICOM_SUFFIXES, is_unnamed_dicom
from shoal.data.images import Frame, image_suffixes
from shoal.data.mapped import Images, Labelled, MappedImages
from shoal.data.readers import read_text
from shoal.errors import ShoalError, ShoalWarning

Listing = list[tuple[Path, int]]
"""Image files with their labels."""
VALIDATION = ("val", "valid", "validation")
"""Names of a folder with the validation split."""

# Not hidden, but made by archive programs, file servers and operating systems.
_FOREIGN = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


# ---- images in folders


def read_images(source: Source, cache: Path | None) -> Images:
    """Decode to uint8 [N, C, H, W], in the channels and size of the source's frame.

    With `cache`, or when the images would take more than half of the machine's memory, they are in a file that is read
    batch by batch (see `shoal.data.decoded`), which is in `usual_cache` if `cache` is None. Raises ShoalError, naming
    the first file that is unreadable or differs in size from the first image.
    """
    if cache is not None:
        return decoded(source, cache)
    first, count = source.frame.read(source.paths[0]), len(source.paths)
    if count * first.nbytes > memory() // 2:
        return decoded(source, usual_cache())
    images, start = np.empty((count, *first.shape), dtype=np.uint8), 0
    for part in decode(source, first.shape):
        images[start : start + len(part)] = part
        start += len(part)
    return torch.from_numpy(images)


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usual_cache() -> Path:
    """Folder for decoded images if none was given: ``shoal/images`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal" / "images"


def list_images(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name; hidden files and other files are left out.

    Raises ShoalError when there are none.
    """
    suffixes = {*image_suffixes(), *DICOM_SUFFIXES}
    found = sorted(p for p in folder.iterdir() if p.name[0] != ".") if folder.is_dir() else []
    files = [p for p in found if p.suffix.lower() in suffixes or is_unnamed_dicom(p)]
    if not files:
        raise ShoalError(f"found no image at {folder}; need at least one, such as a PNG or JPEG file; add images there")
    return files


def list_classes(folder: Path) -> list[str]:
    """Sorted names of the class folders in `folder`; a class's label is its position.

    Hidden folders are left out, and so are those that programs leave behind, such as ``__MACOSX``, with a
    ShoalWarning. Raises ShoalError when there are no others.
    """
    names = _class_folders(folder)
    if not names:
        raise ShoalError(f"found no class folder at {folder}; need one folder of images per class; add them there")
    if foreign := [name for name in _FOREIGN if (folder / name).is_dir()]:
        _warn(f"found {', '.join(foreign)} at {folder}; need only class folders there; left out")
    return names


def _class_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder` that may be classes; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in _FOREIGN)


def _warn(text: str) -> None:
    warnings.warn(text, ShoalWarning, stacklevel=3)


def list_labelled(folder: Path, labels: Mapping[str, int], inner: str = "") -> Listing:
    """Image files, with labels, in `folder`/<class>/`inner` for every class in `labels`.

    Raises ShoalError when a class has no images.
    """
    return [(path, label) for name, label in labels.items() for path in list_images(folder / name / inner)]


def read_listings(listings: Sequence[Listing], root: Path, frame: Frame, cache: Path | None) -> list[Labelled]:
    """Decode the images of all splits together, because all must have the same size; `read_images` says where to.

    Raises ShoalError when an image is unreadable or differs in size.
    """
    images = read_images(Source(root, [path for files in listings for path, _ in files], frame), cache)
    rows = torch.arange(len(images)).split([len(files) for files in listings])
    labels = [torch.tensor([label for _, label in files]) for files in listings]
    # Slices of images in memory share their memory.
    own = [images.chosen(r) if isinstance(images, MappedImages) else images[int(r[0]) : int(r[-1]) + 1] for r in rows]
    return list(zip(own, labels, strict=True))


# ---- folders of images by class


def read_folder(root: Path, frame: Frame, cache: Path | None = None) -> tuple[dict[str, Labelled], tuple[str, ...]]:
    """Images and labels of the splits ``train``, ``test`` and ``val``, as far as `root` has them, and the class names.

    Labels are positions in these sorted names; `read_images` says what `cache` is. `split_folders` says which folder is
    which split; the class folders of a set without splits are the split ``train``. Warns of a single class. Raises
    ShoalError when a class has no images, or a class of another split is not a training class.
    """
    folders = split_folders(root)
    labels = {name: i for i, name in enumerate(list_classes(folders["train"]))}
    if len(labels) == 1:
        _warn(f"found one class ({next(iter(labels))}) at {folders['train']}; need two or more to tell classes apart")
    listings = [list_labelled(folders["train"], labels)]
    listings += [_list_split(folder, labels) for part, folder in folders.items() if part != "train"]
    return dict(zip(folders, read_listings(listings, root, frame, cache), strict=True)), tuple(labels)


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split in `root`.

    - ``train`` and ``test``: these two.
    - ``train``, ``test``, and one of ``val``, ``valid`` and ``validation``: all three.
    - ``train`` and a validation folder only: the validation folder is the split ``test``, as in ImageNet.
    - Neither ``train`` nor ``test`` with class folders: `root` itself is the split ``train``.

    Raises ShoalError for several validation folders.
    """
    train, test = root / "train", root / "test"
    if not _class_folders(train) and not _class_folders(test):
        return {"train": root}
    validation = [root / name for name in VALIDATION if _class_folders(root / name)]
    if len(validation) > 1:
        names = " and ".join(path.name for path in validation)
        raise ShoalError(f"found the folders {names} at {root}; need one validation folder; move the others")
    if validation and _class_folders(test):
        return {"train": train, "test": test, "val": validation[0]}
    if validation and test.exists():
        _warn(f"found no class folder at {test}; need one per class; the test split is {validation[0].name}/ instead")
    return {"train": train, "test": validation[0] if validation else test}


def _list_split(folder: Path, labels: Mapping[str, int]) -> Listing:
    """Image files, with labels, of the classes in `folder`. Raises ShoalError for a class that is not in `labels`."""
    present = list_classes(folder)
    for name in sorted(set(present) - labels.keys()):
        raise ShoalError(f"found class {name} at {folder}; need only classes of train/; move that folder")
    return list_labelled(folder, {name: labels[name] for name in present})


# ---- Tiny-ImageNet


def _annotated(path: Path, labels: Mapping[str, int]) -> Listing:
    """Image files and labels in val_annotations.txt, for the classes in `labels`."""
    files = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise ShoalError(f"found {line!r} at {path}:{number}; need FILE<tab>CLASS<tab>...; fetch the file again")
        if fields[1] in labels:
            files.append((path.parent / "images" / fields[0], labels[fields[1]]))
    return files


def read_tiny_imagenet(
    folder: Path, frame: Frame, cache: Path | None = None
) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    """Training and validation images with labels, and the names of the classes, from words.txt if it is there.

    Labels are positions in the sorted lines of wnids.txt. Raises ShoalError when files are missing or damaged.
    """
    labels = {wnid: i for i, wnid in enumerate(sorted(set(read_text(folder / "wnids.txt").split())))}
    annotations = folder / "val" / "val_annotations.txt"
    held_out = _annotated(annotations, labels)
    if not held_out:
        raise ShoalError(f"found no image of the {len(labels)} classes at {annotations}; need some; fetch it again")
    train = list_labelled(folder / "train", labels, "images")
    both = read_listings([train, held_out], folder, frame, cache)
    return both[0], both[1], _words(folder / "words.txt", labels)


def _words(path: Path, wnids: Iterable[str]) -> tuple[str, ...]:
    """The first word of each class in words.txt; without the file, the classes' own names such as n01443537."""
    lines = read_text(path).splitlines() if path.exists() else []
    words = {wnid: text.split(",")[0] for wnid, _, text in (line.partition("\t") for line in lines) if text}
    return tuple(words.get(wnid, wnid) for wnid in wnids)
