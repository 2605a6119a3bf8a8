"""The ONNX files that networks were made from: each run folder keeps a copy, which its `Spec` names by SHA-256."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from torch import nn

from shoal.conversion.network import Converted, convert
from shoal.conversion.source import read_content
from shoal.data.dataset import Dataset
from shoal.errors import ShoalError
from shoal.networks.spec import Spec
from shoal.storage.files import replacing

ENDING = ".onnx"
"""The ending of an ONNX file's name."""


def open_file(path: Path, data: Dataset, classes: int | None) -> tuple[Spec, Converted]:
    """The spec and the network of an ONNX file for the images of `data`.

    Raises ShoalError when the file is damaged, or has operators that cannot be converted.
    """
    content = read_content(path)
    digest = hashlib.sha256(content).hexdigest()
    folder = str(path.absolute().parent)
    spec = Spec(path.name, classes or data.classes, data.shape, folder=folder, digest=digest)
    return spec, convert(content, data.shape, str(path))


def network_in_file(spec: Spec) -> nn.Module:
    """The network of the ONNX file of `spec`.

    Raises ShoalError when the file is missing or has changed, and for another width or resolution than its own.
    """
    if (spec.width, spec.resolution) != (1.0, 1.0):
        raise ShoalError(
            f"found width {spec.width:g} and resolution {spec.resolution:g} for {spec.base}; need 1 and 1, because an "
            "ONNX file has one size; leave them out"
        )
    return convert(_content(spec), spec.shape, spec.base).network


def _content(spec: Spec) -> bytes:
    for path, read in (
        (_kept(Path(spec.folder), spec), Path.read_bytes),
        (Path(spec.folder) / spec.base, read_content),
    ):
        if path.exists():
            content = read(path)
            if hashlib.sha256(content).hexdigest() == spec.digest:
                return content
            raise ShoalError(
                f"found another file at {path} than the network was made from; need one with SHA-256 {spec.digest}; "
                "put it back"
            )
    raise ShoalError(
        f"found no {_kept(Path(spec.folder), spec)}; need the ONNX file that the network was made from; put it back"
    )


def _kept(folder: Path, spec: Spec) -> Path:
    return folder / f"network-{spec.digest[:16]}{ENDING}"


def keep_file(spec: Spec, folder: Path) -> None:
    """Copy the ONNX file of `spec` into the run's `folder`, unless it is there. Raises ShoalError if it is missing."""
    place = _kept(folder, spec)
    if not place.exists():
        content = _content(spec)
        with replacing(place) as scratch:
            scratch.write_bytes(content)


def found_in(folder: Path, spec: Spec) -> Spec:
    """The spec, with the run's `folder` as the place of its ONNX file if that has a copy."""
    return replace(spec, folder=str(folder.absolute())) if _kept(folder, spec).exists() else spec
