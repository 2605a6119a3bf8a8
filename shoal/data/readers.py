"""Readers of IDX files and SVHN's MATLAB files, and what all readers of image sets share.

Each reader takes bytes or paths and returns `Arrays`: uint8 images [N, C, H, W] and int64 labels [N] in 0..classes-1.
Files are untrusted: one that does not follow its layout raises ShoalError, which names the file.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shoal.errors import ShoalError

Arrays = tuple[Tensor, Tensor]
"""Images uint8 [N, C, H, W] (or clouds float32 [N, 3, P, 1]) and labels int64 [N]."""


# ---- shared by all readers


def read_bytes(path: Path) -> bytes:
    """The whole content of `path`, decompressed if it is gzip. Raises ShoalError when it is missing or damaged."""
    try:
        raw = path.read_bytes()
        # The content decides, not the suffix: browsers and mirrors unpack `.gz` files without renaming them.
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ShoalError(f"found no readable file at {path} ({error}); need it whole; fetch it again") from error


def arrays(images: np.ndarray, labels: np.ndarray, classes: int, where: str) -> Arrays:
    """Check images uint8 [N, C, H, W] and labels [N], and convert them to tensors.

    Raises ShoalError, naming the file `where`, when there are no images, another number of labels, or a label that is
    not in 0..classes-1.
    """
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
    # Arrays made from bytes are read-only, and torch would share their memory. These are copied, others are not.
    return torch.from_numpy(np.require(images, requirements=["C", "W"])), torch.from_numpy(labels.astype(np.int64))


def read_text(path: Path) -> str:
    """The text of a small UTF-8 file, with or without a byte order mark; all line ends become ``\\n``.

    Raises ShoalError when it is missing or not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ShoalError(f"found no text file at {path} ({error}); need it as published; fetch it again") from error


# ---- IDX (MNIST's layout)


def parse_idx(raw: bytes, dims: int, where: str) -> np.ndarray:
    """The uint8 array with `dims` dimensions in the IDX bytes `raw`.

    Raises ShoalError, naming the file `where`, when the magic number or the size is wrong.
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
    """Images uint8 [N, 1, side, side] and labels int64 [N] from the bytes of an IDX image file and label file.

    Raises ShoalError, naming the file `where`, when they are damaged or of another size.
    """
    pixels = parse_idx(images, 3, where)
    if pixels.shape[1:] != (side, side):
        raise ShoalError(
            f"found images of {pixels.shape[1]}x{pixels.shape[2]} at {where}; need {side}x{side}; fetch the file again"
        )
    return arrays(pixels[:, None], parse_idx(labels, 1, f"{where} (its labels)"), classes, where)


def read_idx_pair(folder: Path, prefix: str, classes: int, side: int) -> Arrays:
    """`parse_idx_pair` of `prefix`-images-idx3-ubyte and `prefix`-labels-idx1-ubyte, plain or .gz, in `folder`.

    Raises ShoalError when a file is missing or damaged.
    """

    def content(stem: str) -> bytes:
        packed = folder / f"{prefix}-{stem}-ubyte.gz"
        return read_bytes(packed if packed.exists() else packed.with_suffix(""))

    return parse_idx_pair(content("images-idx3"), content("labels-idx1"), classes, side, f"{folder}/{prefix}-*")


# ---- SVHN's MATLAB files


def read_svhn(path: Path) -> Arrays:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] in 0..9 from an SVHN .mat file, whose label 10 is the digit 0.

    Raises ShoalError when the file is missing or damaged.
    """
    from scipy.io import loadmat  # imported here, because the other sets do not need scipy

    try:
        content = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # scipy raises many types for damaged files
        raise ShoalError(f"found no MATLAB file at {path} ({error}); need the published one; fetch it again") from error
    images, labels = (np.asarray(content.get(key, ())) for key in "Xy")
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8:
        raise ShoalError(f"found X {images.shape} {images.dtype} at {path}; need X [32,32,3,N] uint8; fetch it again")
    if labels.dtype.kind not in "uif" or not np.isin(labels, np.arange(1, 11)).all():
        raise ShoalError(f"found y with other values than 1..10 at {path}; need the published y; fetch it again")
    return arrays(images.transpose(3, 2, 0, 1), labels.reshape(-1) % 10, 10, str(path))
