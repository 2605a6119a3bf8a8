"""Readers of CIFAR's published pickles, with a restricted unpickler."""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.data.readers import Arrays, arrays, read_bytes
from shoal.errors import ShoalError

CIFAR_SIDE = 32


# ---- CIFAR's pickles
#
# No name in a pickle is resolved to the real object. The few names that the published files use get harmless stand-ins,
# so numpy's C code never rebuilds an array from hostile state. The stand-ins that all pickles share have no
# attributes (`__slots__`), so the opcode BUILD in one pickle cannot affect the next one.


class _Dtype:
    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and alignment, which have no meaning for single bytes."""


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
    """Stand-in for `_codecs.encode`, which protocol 2 uses for bytes. Codecs other than latin1 could inflate them."""

    __slots__ = ()

    def __call__(self, text: str, codec: str) -> bytes:
        if codec != "latin1":
            raise ValueError(f"codec {codec!r}")
        return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _MakeArray(),
    ("numpy._core.multiarray", "_reconstruct"): _MakeArray(),
    ("numpy", "dtype"): _MakeDtype(),
    ("numpy", "ndarray"): None,  # only an argument of _reconstruct
    ("_codecs", "encode"): _Encode(),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise ValueError(f"a call of {module}.{name}")
        return _STAND_INS[module, name]


def _check_memo(raw: bytes) -> None:
    """Refuse memo slots beyond the file's size: the C unpickler allocates gigabytes for a five-byte opcode."""
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(raw):
            raise ValueError(f"memo slot {argument}")


def unpickle(raw: bytes, where: str) -> object:
    """Load a CIFAR pickle of plain containers, bytes, numbers and uint8 arrays; no code in it is run.

    Raises ShoalError when the bytes are not such a pickle, or contain anything else.
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
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] of one CIFAR batch; labels are the list under `label_key`.

    Raises ShoalError, naming the file `where`, when the batch has another layout or a label is not in 0..classes-1.
    """
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
        raise ShoalError(
            f"found bad labels at {where}; need a list of integers in 0..{classes - 1}; fetch the file again"
        )
    return arrays(rows.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE), np.array(labels, dtype=np.int64), classes, where)


@dataclass(frozen=True)
class Cifar:
    """The published files of CIFAR-10 or CIFAR-100."""

    folder: str
    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    label_key: bytes
    classes: int


def read_archive(path: Path, spec: Cifar) -> dict[str, bytes]:
    """The contents of the batches in the published archive, by file name; nothing is unpacked to disk.

    Raises ShoalError when the archive's MD5 differs from the published one.
    """
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
    """Training and test arrays of a CIFAR set, from its folder or archive. Raises ShoalError, naming a bad file."""
    held = read_archive(path, spec) if path.is_file() else None

    def batch(name: str) -> Arrays:
        raw = read_bytes(path / name) if held is None else held.get(name, b"")
        return parse_cifar(raw, spec.label_key, spec.classes, str(path / name))

    images, labels = zip(*map(batch, spec.train), strict=True)
    return (torch.cat(images), torch.cat(labels)), batch(spec.test)
