"""Readers of image sets in their published layouts: IDX, CIFAR pickles, SVHN's MATLAB files, image folders.

Each reader takes bytes or paths and returns `Arrays`: uint8 images [N, C, H, W] and int64 labels [N] in
0..classes-1. Files are untrusted: a file that cannot be read as its layout says raises ShoalError with its name.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import pickletools
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.errors import ShoalError

Arrays = tuple[Tensor, Tensor]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
CIFAR_SIDE = 32


# ---- what every reader shares


def read_bytes(path: Path) -> bytes:
    """Whole content of `path`, decompressed if it is gzip. Raises ShoalError if it is missing or damaged."""
    try:
        raw = path.read_bytes()
        # By content, not by suffix: browsers and mirrors unpack `.gz` files without renaming them.
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ShoalError(f"found no readable file at {path} ({error}); need it whole; fetch it again") from error


def arrays(images: np.ndarray, labels: np.ndarray, classes: int, where: str) -> Arrays:
    """Check and convert images uint8 [N, C, H, W] and labels [N]; `where` names the file in ShoalErrors."""
    if len(images) != len(labels) or not len(images):
        raise ShoalError(
            f"found {len(images)} images and {len(labels)} labels at {where}; need as many of both, at least one; "
            "fetch the files again"
        )
    wrong = ~np.isin(labels, np.arange(classes))
    if wrong.any():
        raise ShoalError(
            f"found label {labels[wrong][0]} (item {int(wrong.argmax())}) at {where}; need labels in "
            f"0..{classes - 1}; fetch the file again"
        )
    # Arrays over bytes are read-only, and torch would share their memory: those are copied, others are not.
    return torch.from_numpy(np.require(images, requirements=["C", "W"])), torch.from_numpy(labels.astype(np.int64))


def read_text(path: Path) -> str:
    """Text of a small UTF-8 file. Raises ShoalError if it is missing or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ShoalError(f"found no text file at {path} ({error}); need it as published; fetch it again") from error


# ---- IDX (MNIST's layout)


def parse_idx(raw: bytes, dims: int, where: str) -> np.ndarray:
    """The uint8 array with `dims` dimensions that the IDX bytes `raw` hold.

    Raises ShoalError if the magic number or the size does not fit.
    """
    magic, header = 0x800 + dims, 4 + 4 * dims
    if raw[:4] != struct.pack(">I", magic) or len(raw) < header:
        raise ShoalError(
            f"found first bytes {raw[:4].hex() or 'none'} at {where}; need IDX magic {magic:08x} and its header; "
            "fetch the file again"
        )
    shape = struct.unpack(f">{dims}I", raw[4:header])
    need = header + int(np.prod(np.array(shape, dtype=object)))
    # An empty shape can still overflow numpy's sizes in its other dimensions.
    if len(raw) != need or need == header:
        raise ShoalError(
            f"found {len(raw)} bytes at {where}; need {need} for its declared shape {shape}; fetch the file again"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def parse_idx_pair(images: bytes, labels: bytes, classes: int, side: int, where: str) -> Arrays:
    """Grey images [N, 1, side, side] and labels from the bytes of an IDX image file and its label file."""
    pixels = parse_idx(images, 3, where)
    if pixels.shape[1:] != (side, side):
        raise ShoalError(
            f"found images of {pixels.shape[1]}x{pixels.shape[2]} at {where}; need {side}x{side}; fetch the file again"
        )
    return arrays(pixels[:, None], parse_idx(labels, 1, f"{where} (its labels)"), classes, where)


def read_idx_pair(folder: Path, prefix: str, classes: int, side: int) -> Arrays:
    """`parse_idx_pair` of the files `prefix`-images-idx3-ubyte and `prefix`-labels-idx1-ubyte, plain or .gz."""

    def content(stem: str) -> bytes:
        packed = folder / f"{prefix}-{stem}-ubyte.gz"
        return read_bytes(packed if packed.exists() else packed.with_suffix(""))

    return parse_idx_pair(content("images-idx3"), content("labels-idx1"), classes, side, f"{folder}/{prefix}-*")


# ---- CIFAR's pickles
#
# No name in a pickle ever reaches the real object. The few that the published files use get inert stand-ins,
# which also spares numpy's C code from rebuilding an array out of hostile state. The stand-ins have no
# attributes to set (`__slots__`), so that one pickle's BUILD cannot change what the next one sees.


class _Dtype:
    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment, which mean nothing to single bytes."""


class _Array:
    __slots__ = ("values",)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", b"u1"):
            raise ValueError("an array that is not uint8")
        self.values = np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


class _MakeArray:
    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _MakeDtype:
    __slots__ = ()

    def __call__(self, *args: Any) -> _Dtype:
        return _Dtype(*args)


class _Encode:
    """`_codecs.encode`, which protocol 2 uses for bytes, with its one codec: others could inflate the input."""

    __slots__ = ()

    def __call__(self, text: str, codec: str) -> bytes:
        if codec != "latin1":
            raise ValueError(f"codec {codec!r}")
        return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _MakeArray(),
    ("numpy._core.multiarray", "_reconstruct"): _MakeArray(),
    ("numpy", "dtype"): _MakeDtype(),
    ("numpy", "ndarray"): None,  # only ever an argument of _reconstruct
    ("_codecs", "encode"): _Encode(),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise ValueError(f"a call of {module}.{name}")
        return _STAND_INS[module, name]


def _check_memo(raw: bytes) -> None:
    """Refuse memo slots past the file's size: the C unpickler allocates gigabytes for a five-byte opcode."""
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(raw):
            raise ValueError(f"memo slot {argument}")


def unpickle(raw: bytes, where: str) -> object:
    """Load a CIFAR pickle of plain containers, bytes, numbers and uint8 arrays; nothing in it is executed.

    Raises ShoalError if the bytes are no such pickle, or name anything beyond those.
    """
    try:
        _check_memo(raw)
        return _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # damaged opcodes raise anything from KeyError to RecursionError
        raise ShoalError(
            f"found {error or type(error).__name__} in the pickle at {where}; need the published file, which holds "
            "only plain values and uint8 arrays; fetch the file again"
        ) from error


def parse_cifar(raw: bytes, label_key: bytes, classes: int, where: str) -> Arrays:
    """Images [N, 3, 32, 32] and labels [N] from one CIFAR batch; labels are the list under `label_key`."""
    batch = unpickle(raw, where)
    if not isinstance(batch, dict) or not {b"data", label_key} <= batch.keys():
        found = sorted(map(repr, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise ShoalError(f"found {found} at {where}; need keys b'data' and {label_key!r}; fetch the file again")
    rows, width = getattr(batch[b"data"], "values", None), 3 * CIFAR_SIDE**2
    if rows is None or rows.ndim != 2 or rows.shape[1] != width:
        found = "no array" if rows is None else f"an array of shape {rows.shape}"
        raise ShoalError(f"found {found} as data at {where}; need rows of {width} bytes; fetch the file again")
    labels = batch[label_key]
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < classes for label in labels):
        raise ShoalError(f"found odd labels at {where}; need a list of 0..{classes - 1}; fetch the file again")
    return arrays(rows.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE), np.array(labels, dtype=np.int64), classes, where)


@dataclass(frozen=True)
class Cifar:
    """How one of the two CIFAR sets is published."""

    folder: str
    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    label_key: bytes
    classes: int


def read_archive(path: Path, spec: Cifar) -> dict[str, bytes]:
    """The batches in the published archive, by name, without unpacking to disk. Raises ShoalError if altered."""
    raw = path.read_bytes()
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found != spec.md5:
        raise ShoalError(f"found MD5 {found} at {path}; need {spec.md5}, as published; fetch the archive again")
    batches = {}
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:*") as archive:
        for member in archive:
            content = archive.extractfile(member)
            batches[Path(member.name).name] = content.read() if content else b""
    return batches


def read_cifar(path: Path, spec: Cifar) -> tuple[Arrays, Arrays]:
    """Train and test of a CIFAR set from its folder or its archive. Raises ShoalError naming the bad file."""
    held = read_archive(path, spec) if path.is_file() else None

    def batch(name: str) -> Arrays:
        raw = read_bytes(path / name) if held is None else held.get(name, b"")
        return parse_cifar(raw, spec.label_key, spec.classes, str(path / name))

    images, labels = zip(*map(batch, spec.train), strict=True)
    return (torch.cat(images), torch.cat(labels)), batch(spec.test)


# ---- SVHN's MATLAB files


def read_svhn(path: Path) -> Arrays:
    """Images [N, 3, 32, 32] and labels 0..9 from an SVHN .mat file, where label 10 stands for the digit 0."""
    from scipy.io import loadmat  # here, as no other set needs scipy

    try:
        content = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # scipy passes on whatever a damaged file makes it do
        raise ShoalError(f"found no MATLAB file at {path} ({error}); need the published one; fetch it again") from error
    images, labels = (np.asarray(content.get(key, ())) for key in "Xy")
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8:
        raise ShoalError(f"found X {images.shape} {images.dtype} at {path}; need X [32,32,3,N] uint8; fetch it again")
    if labels.dtype.kind not in "uif" or not np.isin(labels, np.arange(1, 11)).all():
        raise ShoalError(f"found y with other values than 1..10 at {path}; need the published y; fetch it again")
    return arrays(images.transpose(3, 2, 0, 1), labels.reshape(-1) % 10, 10, str(path))


# ---- images in folders


def _decode(path: Path, size: int | None) -> np.ndarray:
    from PIL import Image  # here, as the other sets need no Pillow

    try:
        with Image.open(path) as image:
            colour = image.convert("RGB")
            if size is not None and colour.size != (size, size):
                colour = colour.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(colour).transpose(2, 0, 1)
    except Exception as error:  # Pillow's readers raise a dozen types on damaged files
        raise ShoalError(
            f"found no readable image at {path} ({error}); need PNG or JPEG; replace or remove the file"
        ) from error


def read_images(paths: Sequence[Path], size: int | None) -> np.ndarray:
    """Decode to uint8 RGB [N, 3, H, W], resized to size x size if given (aspect ratio is not kept).

    Raises ShoalError naming the first file that is unreadable, or differs in size from the first file.
    """
    shape = _decode(paths[0], size).shape
    images = np.empty((len(paths), *shape), dtype=np.uint8)
    # Pillow releases the GIL while it decodes.
    with ThreadPoolExecutor() as pool:
        for index, image in enumerate(pool.map(lambda path: _decode(path, size), paths)):
            if image.shape != shape:
                raise ShoalError(
                    f"found an image of {image.shape[2]}x{image.shape[1]} at {paths[index]}; need "
                    f"{shape[2]}x{shape[1]} like {paths[0].name}; resize it, or give size="
                )
            images[index] = image
    return images


def list_images(folder: Path) -> list[Path]:
    """PNG and JPEG files right in `folder`, by name. Raises ShoalError if there is none."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    if not files:
        raise ShoalError(f"found no image at {folder}; need at least one PNG or JPEG file; add images there")
    return files


def list_classes(folder: Path) -> list[str]:
    """Names of the class folders in `folder`, sorted; the label is the position. Raises ShoalError if none."""
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []
    if not names:
        raise ShoalError(f"found no class folder at {folder}; need one folder of images per class; add them there")
    return names


Listing = list[tuple[Path, int]]  # image files with their labels


def list_labelled(folder: Path, labels: Mapping[str, int], inner: str = "") -> Listing:
    """The images in `folder`/<class>/`inner` for every class of `labels`."""
    return [(path, label) for name, label in labels.items() for path in list_images(folder / name / inner)]


def read_listings(train: Listing, test: Listing, classes: int, size: int | None, where: str) -> tuple[Arrays, Arrays]:
    """Decode both splits in one go, so that all images of both must share their size."""
    images = read_images([path for path, _ in (*train, *test)], size)
    labels = np.array([label for _, label in (*train, *test)])
    cut = len(train)
    return arrays(images[:cut], labels[:cut], classes, where), arrays(images[cut:], labels[cut:], classes, where)


def read_folder(root: Path, size: int | None) -> tuple[Arrays, Arrays | None, int]:
    """Train, test (None without root/train and root/test), number of classes; labels are sorted class names.

    Raises ShoalError for a class without images, and for a test class that is no training class.
    """
    if not any(path.is_dir() for part in ("train", "test") for path in (root / part).glob("*")):
        labels = {name: i for i, name in enumerate(list_classes(root))}
        files = list_labelled(root, labels)
        images = read_images([path for path, _ in files], size)
        return arrays(images, np.array([label for _, label in files]), len(labels), str(root)), None, len(labels)
    labels = {name: i for i, name in enumerate(list_classes(root / "train"))}
    present = list_classes(root / "test")
    for name in sorted(set(present) - labels.keys()):
        raise ShoalError(f"found class {name} at {root / 'test'}; need only classes of train/; move that folder")
    held_out = list_labelled(root / "test", {name: labels[name] for name in present})
    both = read_listings(list_labelled(root / "train", labels), held_out, len(labels), size, str(root))
    return (*both, len(labels))


# ---- Tiny-ImageNet


def _annotated(path: Path, labels: Mapping[str, int]) -> Listing:
    """The image files that the lines of val_annotations.txt name for the classes in `labels`."""
    files = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise ShoalError(f"found {line!r} at {path}:{number}; need FILE<tab>CLASS<tab>...; fetch the file again")
        if fields[1] in labels:
            files.append((path.parent / "images" / fields[0], labels[fields[1]]))
    return files


def read_tiny_imagenet(folder: Path, size: int | None) -> tuple[Arrays, Arrays, int]:
    """Train, validation and the number of classes; labels are positions in the sorted lines of wnids.txt."""
    labels = {wnid: i for i, wnid in enumerate(sorted(set(read_text(folder / "wnids.txt").split())))}
    annotations = folder / "val" / "val_annotations.txt"
    held_out = _annotated(annotations, labels)
    if not held_out:
        raise ShoalError(f"found no image of the {len(labels)} classes at {annotations}; need some; fetch it again")
    train = list_labelled(folder / "train", labels, "images")
    return (*read_listings(train, held_out, len(labels), size, str(folder)), len(labels))
