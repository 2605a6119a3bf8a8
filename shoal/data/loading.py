"""`load` reads a data set by name from its published files."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from shoal.data import clouds as point_clouds
from shoal.data import readers
from shoal.data.cifar import Cifar, read_cifar
from shoal.data.class_names import CLASS_NAMES
from shoal.data.dataset import CLOUDS, NAMES, Dataset, Split
from shoal.data.decoded import Moments
from shoal.data.folders import read_folder, read_tiny_imagenet
from shoal.data.images import STRETCH, Frame, check_frame
from shoal.data.mapped import Labelled
from shoal.data.readers import Arrays
from shoal.data.splits import divide, hold_out, moments
from shoal.errors import ShoalError

POINTS = 1024
"""Default number of points per cloud, as in PointNet++ and DGCNN."""
DEFAULT_ROOTS = (Path(".data"), Path("/usr/share/datasets"))
"""Folders to search when no `root` is given: `.data` in the current folder, then that of Debian's data packages."""
# Other sets are not augmented. A mirrored digit is another symbol, and what is in a `folder` is unknown.
_AUGMENT = {"fashion-mnist": "crop", "cifar10": "crop-flip", "cifar100": "crop-flip", "tiny-imagenet": "crop-flip"}
_AUGMENT |= dict.fromkeys(CLOUDS, "scale-shift")
_PUBLISHED: dict[str, Moments] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_FILES = ("folder", "tiny-imagenet")
"""Sets of image files."""
_CIFAR = {
    "cifar10": Cifar(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        label_key=b"labels",
        classes=10,
    ),
    "cifar100": Cifar(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        train=("train",),
        test="test",
        label_key=b"fine_labels",
        classes=100,
    ),
}
_SOURCES = {
    "fashion-mnist": "install Debian's package dataset-fashion-mnist, or fetch the four IDX files of "
    "github.com/zalandoresearch/fashion-mnist",
    "cifar10": "fetch cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100": "fetch cifar-100-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html",
    "svhn": "fetch train_32x32.mat and test_32x32.mat from ufldl.stanford.edu/housenumbers",
    "tiny-imagenet": "fetch and unpack tiny-imagenet-200.zip from cs231n.stanford.edu",
    "modelnet10": "fetch and unpack ModelNet10.zip from modelnet.cs.princeton.edu",
    "modelnet40": "fetch and unpack ModelNet40.zip from modelnet.cs.princeton.edu, or modelnet40_normal_resampled.zip "
    "from shapenet.cs.stanford.edu/media",
}


Size = int | tuple[int, int]
"""Size of images in pixels: that of both sides, or (height, width). For clouds, the number of points."""


def load(
    name: str,
    root: str | Path | None = None,
    *,
    val: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    size: Size | None = None,
    fit: str | None = None,
    channels: int | None = None,
    cache: str | Path | None = None,
) -> Dataset:
    """Load the set `name`: one of NAMES or CLOUDS, or the path of a directory of images by class.

    A path that equals one of these names is written ``./digits``, or in full. `root` is the set's published folder, or
    the directory that holds this folder or the archive; without it, DEFAULT_ROOTS are searched.

    `val` is the fraction of the training images that is held out, stratified and chosen by `seed`. `limit` is the
    largest number of training images to keep, stratified. A directory with ``train``, ``test`` and ``val`` (or
    ``valid``, ``validation``) has all three splits, and nothing is held out. With ``train`` and ``val`` only, ``val``
    is the test split, as in ImageNet. With class folders only, 20 % of the images are the test split.

    `size` resizes images; without it, digits are 16x16, fashion-mnist is zero-padded to 32x32, and other sets stay as
    they are. For clouds, `size` is the number of points, by default POINTS. Image files (a directory, tiny-imagenet)
    are read by the rules of `shoal.data.images.read_image`: `fit` is the rule for images of another size (default
    ``stretch``), `channels` is 3 (default) or 1 for grey. With a folder `cache` they are decoded once into a file there
    and read batch by batch; sets larger than half of the memory always are, by default in ``~/.cache/shoal/images``.

    Raises ShoalError for an unknown name, an argument out of range, and missing or damaged data. Warns of a directory
    with a single class, and of folders in it that are left out.
    """
    kind, root = _kind(name, root)
    _check_arguments(val, limit, size)
    frame = _frame(kind, size, fit, channels)
    read = _read(kind, root, frame, seed, _cache(kind, cache))
    kept, held = _held_out(read, val, limit, seed)
    mean, std = _PUBLISHED.get(kind) or moments(kept.images)
    test, augment, applied = Split(*read.test), _AUGMENT.get(kind, "none"), frame.size and kind in _FILES
    fit = frame.fit if applied else None
    return Dataset(name, kept, held, test, len(read.names), mean, std, augment, read.names, fit)


def _check_arguments(val: float, limit: int | None, size: Size | None) -> None:
    if not 0 <= val < 1:
        raise ShoalError(f"found {val} at val; need a fraction in [0, 1); give 0.1, say, or 0 for none")
    smallest = min(size) if isinstance(size, tuple) else size
    for name, value in (("limit", limit), ("size", smallest)):
        if value is not None and value < 1:
            raise ShoalError(f"found {value} at {name}; need 1 or more; leave it out for the whole set as it is")


def _check_files(kind: str, **options: Any) -> None:
    """Raise ShoalError for options of image files with another set."""
    for option, value in options.items():
        if value is not None and kind not in _FILES:
            raise ShoalError(
                f"found {option} {value} for {kind}; need a set of image files ({' or '.join(_FILES)}) for it; leave "
                f"out --{option} ({option}=)"
            )


def _cache(kind: str, cache: str | Path | None) -> Path | None:
    """The folder for decoded images. Raises ShoalError for a set that is not in image files."""
    _check_files(kind, cache=cache)
    return None if cache is None else Path(cache).expanduser()


def _frame(kind: str, size: Size | None, fit: str | None, channels: int | None) -> Frame:
    """Size, rule and channels of the images of a set. Raises ShoalError for what the set cannot have."""
    _check_files(kind, fit=fit, channels=channels)
    if fit is not None and size is None:
        raise ShoalError(f"found fit {fit} without a size; need the size to fit to; give --size (size=), too")
    if isinstance(size, tuple) and kind in CLOUDS:
        raise ShoalError(f"found size {size[0]}x{size[1]} for {kind}; need one number of points; give {POINTS}, say")
    both = (size, size) if isinstance(size, int) else size
    check_frame(3 if channels is None else channels, both, fit or STRETCH)
    return Frame(3 if channels is None else channels, both, fit or STRETCH)


def _kind(name: str, root: str | Path | None) -> tuple[str, Path | None]:
    """The entry of NAMES or CLOUDS for `name`, and its root. A known name wins over a directory with that name."""
    if name in (*NAMES, *CLOUDS):
        return name, None if root is None else Path(root).expanduser()
    if name and root is None and Path(name).expanduser().is_dir():
        return "folder", Path(name).expanduser()
    close = get_close_matches(name.lower(), (*NAMES, *CLOUDS), n=1)
    hint = f"did you mean {close[0]}?" if close else "give one of these, or the path of a directory and no root"
    raise ShoalError(f"found {name!r} at data set name; need one of {', '.join((*NAMES, *CLOUDS))}; {hint}")


# ---- finding and reading each set


class _Read(NamedTuple):
    """The splits of a set, and the names of its classes; `val` is None if the set has no validation split."""

    train: Labelled
    test: Labelled
    names: tuple[str, ...]
    val: Labelled | None = None


def _held_out(read: _Read, val: float, limit: int | None, seed: int) -> tuple[Split, Split]:
    """Training and validation split; the set's own validation split if it has one."""
    kept, held = hold_out(Split(*read.train), 0.0 if read.val else val, limit, seed)
    return kept, Split(*read.val) if read.val else held


def _read(kind: str, root: Path | None, frame: Frame, seed: int, cache: Path | None) -> _Read:
    """The set as it is published, in the size that `load` documents."""
    size = frame.size
    if kind == "folder":
        return _read_folder(root, frame, seed, cache)
    if kind in CLOUDS:
        return _Read(*_read_clouds(kind, root, size[0] if size else POINTS))
    if kind == "tiny-imagenet":
        wnids = _find(kind, root, ("tiny-imagenet-200/wnids.txt", "wnids.txt"))
        return _Read(*read_tiny_imagenet(wnids.parent, frame, cache))
    if kind == "digits":
        train, test = _read_digits()
        size = size or (16, 16)
    elif kind in _CIFAR:
        train, test = _read_cifar(kind, root)
    else:
        train, test = _read_fashion(root) if kind == "fashion-mnist" else _read_svhn(root)
    return _Read(_resize(train, size), _resize(test, size), CLASS_NAMES[kind])


def _find(kind: str, root: Path | None, places: Sequence[str]) -> Path:
    """The first of `places` that exists under `root`, or without one under DEFAULT_ROOTS."""
    roots = DEFAULT_ROOTS if root is None else (root,)
    for path in (base / place for base in roots for place in places):
        if path.exists():
            return path
    raise ShoalError(
        f"found no {kind} data at {' or '.join(map(str, roots))}; need {' or '.join(places)} there; "
        f"{_SOURCES[kind]}, put that under {roots[0]}, or give --data-dir (root=) the directory that holds it"
    )


def _read_digits() -> tuple[Arrays, Arrays]:
    """scikit-learn's digits, uint8 [N, 1, 8, 8]; 30 % are the test split, the same for every seed of `load`."""
    from sklearn.datasets import load_digits  # imported here, because it takes a second and other sets do not need it

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    images, labels = readers.arrays(pixels[:, None], bunch.target, 10, "scikit-learn's digits")
    return divide(images, labels, 0.3, seed=0)


def _read_fashion(root: Path | None) -> tuple[Arrays, Arrays]:
    stem = "train-images-idx3-ubyte"
    places = [f"{folder}{stem}{suffix}" for folder in ("fashion-mnist/", "") for suffix in ("", ".gz")]
    folder = _find("fashion-mnist", root, places).parent

    def part(prefix: str) -> Arrays:
        images, labels = readers.read_idx_pair(folder, prefix, classes=10, side=28)
        # 32 pixels can be halved five times, which the networks for CIFAR need.
        return F.pad(images, (2, 2, 2, 2)), labels

    return part("train"), part("t10k")


def _read_cifar(kind: str, root: Path | None) -> tuple[Arrays, Arrays]:
    spec = _CIFAR[kind]
    found = _find(kind, root, (f"{spec.folder}/{spec.test}", spec.test, spec.archive))
    return read_cifar(found if found.name == spec.archive else found.parent, spec)


def _read_svhn(root: Path | None) -> tuple[Arrays, Arrays]:
    train = _find("svhn", root, ("svhn/train_32x32.mat", "train_32x32.mat"))
    return readers.read_svhn(train), readers.read_svhn(train.with_name("test_32x32.mat"))


def _read_folder(root: Path | None, frame: Frame, seed: int, cache: Path | None) -> _Read:
    if root is None:
        raise ShoalError("found no data set folder; need a directory of images by class; give --data-dir (root=)")
    parts, names = read_folder(root, frame, cache)
    if "test" not in parts:
        return _Read(*divide(*parts["train"], 0.2, seed), names)
    return _Read(parts["train"], parts["test"], names, parts.get("val"))


def _read_clouds(kind: str, root: Path | None, points: int) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Read meshes if `root` holds them; otherwise text if there is some, else meshes.

    The text files of both sets are published in one folder.
    """
    listed, meshes = f"{kind}_shape_names.txt", kind.replace("modeln", "ModelN")
    places = (f"modelnet40_normal_resampled/{listed}", listed, meshes)
    if root is not None and any(root.glob("*/train/*.off")):
        return point_clouds.read_meshes(root, points)
    found = _find(kind, root, places)
    if found.name == listed:
        return point_clouds.read_resampled(found.parent, kind, points)
    return point_clouds.read_meshes(found, points)


def _resize(pair: Arrays, size: tuple[int, int] | None) -> Arrays:
    """Resize bilinearly to (height, width), in pieces: the whole set as float32 would take four times its memory."""
    images, labels = pair
    if size is None or images.shape[2:] == size:
        return pair
    pieces = [
        F.interpolate(piece.float(), size, mode="bilinear", antialias=True).round().to(torch.uint8)
        for piece in images.split(1024)
    ]
    return torch.cat(pieces), labels
