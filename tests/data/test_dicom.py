"""DICOM slices as grey images: the rules on stand-ins for pydicom's data sets, and a real file if pydicom is there."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from shoal.data.dicom import grey_values
from shoal.data.images import read_image
from shoal.data.loading import load
from shoal.errors import ShoalError
from tests.support.layouts import write_image

VALUES = np.array([[0, 10, 20], [30, 40, 50]], np.int16)
PLAIN = {"PhotometricInterpretation": "MONOCHROME2"}


class Slice(dict[str, Any]):
    """What is used of pydicom's `Dataset`."""

    pixel_array: np.ndarray = VALUES


def window(values: np.ndarray, centre: float, width: float) -> list[list[int]]:
    """The pseudo-code of DICOM PS3.3 C.11.2.1.2.1, value by value."""

    def grey(x: float) -> float:
        if x <= centre - 0.5 - (width - 1) / 2:
            return 0
        if x > centre - 0.5 + (width - 1) / 2:
            return 255
        return ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255

    return [[round(grey(float(x))) for x in row] for row in values]


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({}, [[0, 51, 102], [153, 204, 255]]),
        ({"NumberOfFrames": "1", "RescaleSlope": None, "WindowCenter": "", "WindowWidth": []}, "the same"),
        ({"RescaleSlope": 2.0, "RescaleIntercept": -1024.0}, "the same"),
        ({"RescaleSlope": -1.0}, [[255, 204, 153], [102, 51, 0]]),
        ({"PhotometricInterpretation": "MONOCHROME1"}, [[255, 204, 153], [102, 51, 0]]),
        ({"WindowCenter": 25.0, "WindowWidth": 31.0}, window(VALUES, 25, 31)),
        ({"WindowCenter": "25", "WindowWidth": "31"}, window(VALUES, 25, 31)),
        ({"WindowCenter": [25.0, 1.0], "WindowWidth": [31.0, 2.0]}, window(VALUES, 25, 31)),
        ({"WindowCenter": 20.5, "WindowWidth": 1.0}, window(VALUES, 20.5, 1)),
        (
            {"RescaleSlope": 2.0, "RescaleIntercept": -10.0, "WindowCenter": 30.0, "WindowWidth": 41.0},
            window(2 * VALUES - 10, 30, 41),
        ),
        (
            {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 25.0, "WindowWidth": 31.0},
            (255 - np.array(window(VALUES, 25, 31))).tolist(),
        ),
    ],
)
def test_a_slice_becomes_grey_values(elements: dict[str, Any], expected: Any) -> None:
    grey = grey_values(Slice(PLAIN | elements), "x.dcm")
    assert grey.dtype == np.uint8
    assert grey.tolist() == ([[0, 51, 102], [153, 204, 255]] if expected == "the same" else expected)


def test_a_slice_of_one_value_is_black() -> None:
    flat = Slice(PLAIN)
    flat.pixel_array = np.full((2, 2), 7)
    assert grey_values(flat, "x.dcm").tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("elements", "match"),
    [
        ({"NumberOfFrames": 12}, "found 12 frames at x.dcm; need one slice per file"),
        ({"PhotometricInterpretation": "RGB"}, "type RGB at x.dcm; need MONOCHROME1 or MONOCHROME2"),
        ({"PhotometricInterpretation": None}, "type None at x.dcm"),
        ({"ModalityLUTSequence": [1]}, "lookup table"),
        ({"VOILUTSequence": [1]}, "lookup table"),
        ({"VOILUTFunction": "SIGMOID", "WindowCenter": 1.0, "WindowWidth": 2.0}, "form SIGMOID at x.dcm; need LINEAR"),
        ({"WindowCenter": 1.0, "WindowWidth": 0.0}, "width 0 at x.dcm; need 1 or more"),
    ],
)
def test_other_slices_are_refused(elements: dict[str, Any], match: str) -> None:
    with pytest.raises(ShoalError, match=match):
        grey_values(Slice(PLAIN | elements), "x.dcm")


# ---- files


def element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
    """One element with an explicit type, in little-endian order."""
    value += (b"\0" if kind == b"UI" else b" ") * (len(value) % 2)
    size = struct.pack("<HI", 0, len(value)) if kind == b"OW" else struct.pack("<H", len(value))
    return struct.pack("<HH", group, number) + kind + size + value


def write_dicom(path: Path, values: np.ndarray = VALUES) -> None:
    """A DICOM file by hand: 16-bit signed values, a rescale slope of 2 and an intercept of -10."""
    meta = element(0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2.1")
    numbers = {0x0002: 1, 0x0010: values.shape[0], 0x0011: values.shape[1], 0x0100: 16, 0x0101: 16, 0x0102: 15}
    numbers |= {0x0103: 1}
    rows = {number: element(0x0028, number, b"US", struct.pack("<H", value)) for number, value in numbers.items()}
    rows[0x0004] = element(0x0028, 0x0004, b"CS", b"MONOCHROME2")
    rows |= {number: element(0x0028, number, b"DS", text) for number, text in ((0x1052, b"-10"), (0x1053, b"2"))}
    body = b"".join(rows[number] for number in sorted(rows))
    head = bytes(128) + b"DICM" + element(0x0002, 0x0000, b"UL", struct.pack("<I", len(meta))) + meta
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + body + element(0x7FE0, 0x0010, b"OW", values.astype("<i2").tobytes()))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read by a stand-in for pydicom, which gives the same slice for each."""
    read: list[Path] = []
    module = ModuleType("pydicom")
    module.dcmread = lambda path: (read.append(Path(path)), Slice(PLAIN))[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydicom", module)
    return read


NAMES = ["a.dcm", "a.DCM", "a.dicom", "IM0001", "1.2.840.113619.2"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_dicom_files_are_read_as_grey(tmp_path: Path, stand_in: list[Path], name: str, channels: int) -> None:
    write_dicom(tmp_path / name)
    grey = np.array([[0, 51, 102], [153, 204, 255]])
    assert np.array_equal(read_image(tmp_path / name, channels), np.broadcast_to(grey, (channels, 2, 3)))
    assert stand_in == [tmp_path / name]


def test_a_folder_has_dicom_files_with_and_without_a_suffix(tmp_path: Path, stand_in: list[Path]) -> None:
    for kind in ("cat", "dog"):
        for name in NAMES:
            write_dicom(tmp_path / kind / name)
        (tmp_path / kind / "DICOMDIR.txt").write_bytes(bytes(128) + b"DICM")
        (tmp_path / kind / "readme").write_text("no image")
    data = load("folder", tmp_path, channels=1)
    assert data.shape == (1, 2, 3)
    assert len(data.train) + len(data.val) + len(data.test) == 2 * len(NAMES)


def test_an_image_with_the_bytes_of_dicom_in_it_stays_an_image(tmp_path: Path, stand_in: list[Path]) -> None:
    write_image(tmp_path / "a.png", level=7)
    raw = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(raw.ljust(128, b"\0") + b"DICM")
    assert len(raw) <= 128
    assert (read_image(tmp_path / "a.png") == 7).all()
    assert stand_in == []


def test_without_pydicom_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for name in NAMES:
        write_dicom(tmp_path / name)
        with pytest.raises(ShoalError, match=r"found a DICOM file at .*; pip install shoal\[dicom\]$"):
            read_image(tmp_path / name)


def test_a_real_file(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="needs the dicom extra")
    write_dicom(tmp_path / "a.dcm")
    assert read_image(tmp_path / "a.dcm", 1).tolist() == [[[0, 51, 102], [153, 204, 255]]]


@pytest.mark.parametrize("content", [b"", b"nothing", bytes(128) + b"DICM" + b"\xff" * 40])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("pydicom", reason="needs the dicom extra")
    (tmp_path / "a.dcm").write_bytes(content)
    with pytest.raises(ShoalError, match=r"found .* at .*a\.dcm"):
        read_image(tmp_path / "a.dcm")
