"""The rules by which image files become pixels: one row for each of Pillow's modes, orientation and size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shoal.data.images import EIGHT_BITS, FITS, SIXTEEN_BITS, image_suffixes, read_image
from shoal.data.loading import load
from shoal.errors import ShoalError
from tests.support.layouts import write_folder, write_image

RNG = np.random.default_rng(1)
COLOUR = Image.fromarray(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8))
ALPHA = Image.fromarray(RNG.integers(0, 256, (6, 8), dtype=np.uint8))
WIDE = RNG.integers(0, 65536, (6, 8)).astype(np.uint16)


def converted(mode: str) -> Image.Image:
    """The picture in one of Pillow's modes, by way of the mode that Pillow converts it from."""
    if "A" in mode and mode != "LAB":
        image = COLOUR.convert("RGBA")
        image.putalpha(ALPHA)
        return image.convert(mode)
    return COLOUR.convert(mode)


def wide(mode: str) -> Image.Image:
    """The 16-bit values as an image of the mode."""
    image = Image.new(mode, (8, 6))
    image.frombytes(WIDE.astype(np.asarray(image).dtype).tobytes())
    return image


# ---- modes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", ".png"),
        ("L", ".png"),
        ("LA", ".png"),
        ("P", ".png"),
        ("P", ".gif"),
        ("PA", ".tif"),
        ("RGB", ".png"),
        ("RGB", ".jpg"),
        ("RGB", ".webp"),
        ("RGB", ".bmp"),
        ("RGBA", ".png"),
        ("RGBA", ".webp"),
        ("RGBX", None),
        ("CMYK", ".jpg"),
        ("CMYK", ".tif"),
        ("YCbCr", ".tif"),
        ("HSV", None),
    ],
)
def test_8_bits_are_converted_as_by_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, suffix: str | None, channels: int
) -> None:
    path = saved(converted(mode), tmp_path, monkeypatch, suffix)
    with Image.open(path) as image:
        assert image.mode == mode
        expected = np.atleast_3d(np.asarray(image.convert("L" if channels == 1 else "RGB"))).transpose(2, 0, 1)
    pixels = read_image(path, channels)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (channels, 6, 8)
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("I;16", ".png"), ("I;16", ".tif"), ("I;16B", ".tif"), ("I;16L", None), ("I;16N", None), ("I", ".tif")],
)
def test_16_bit_grey_is_scaled_to_8_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, suffix: str | None, channels: int
) -> None:
    pixels = read_image(saved(wide(mode), tmp_path, monkeypatch, suffix), channels)
    assert np.array_equal(pixels, np.broadcast_to((WIDE / 257).round().astype(np.uint8), (channels, 6, 8)))


@pytest.mark.parametrize(
    ("image", "suffix", "match"),
    [
        (Image.new("F", (8, 6), 0.5), ".tif", "mode F at .*; need 8 bits per channel.*; scale the values"),
        (Image.new("LAB", (8, 6)), ".tif", "mode LAB at .*"),
        (Image.new("La", (8, 6)), None, "mode La at .*"),
        (Image.new("RGBa", (8, 6)), None, "mode RGBa at .*"),
        (Image.new("I", (8, 6), -1), ".tif", "grey values from -1 to -1 at .*; need 0 to 65535; scale"),
        (Image.new("I", (8, 6), 65536), ".tif", "grey values from 65536 to 65536 at .*"),
    ],
)
def test_other_modes_and_values_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Image.Image, suffix: str | None, match: str
) -> None:
    path = saved(image, tmp_path, monkeypatch, suffix)
    with pytest.raises(ShoalError, match=f"found .*{match}"):
        read_image(path)


def test_every_mode_of_pillow_has_a_rule() -> None:
    assert set(Image.MODES) <= {*EIGHT_BITS, *SIXTEEN_BITS, "F", "LAB", "La", "RGBa"}


def saved(image: Image.Image, folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str | None) -> Path:
    """The path of the image in a file; if no format keeps its mode (None), Pillow opens the image itself."""
    path = folder / f"image{suffix or '.png'}"
    if suffix is None:
        path.touch()
        monkeypatch.setattr(Image, "open", lambda path, formats=None: image.copy())
    else:
        image.save(path)
        with Image.open(path) as again:
            assert again.mode == image.mode
    return path


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_transparent_colours_of_a_palette_are_dropped(tmp_path: Path, transparency: int | bytes) -> None:
    path = tmp_path / "image.png"
    COLOUR.convert("P", palette=Image.Palette.ADAPTIVE).save(path, transparency=transparency)
    with Image.open(path) as image:
        assert image.info["transparency"] is not None
        plain = image.copy()
    del plain.info["transparency"]
    assert np.array_equal(read_image(path), np.asarray(plain.convert("RGB")).transpose(2, 0, 1))  # and no warning


# ---- orientation, several images, suffixes

CORNERS = np.zeros((16, 24, 3), np.uint8)
CORNERS[:8, :8], CORNERS[8:, 16:] = 80, 200


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, CORNERS),
        (2, CORNERS[:, ::-1]),
        (3, CORNERS[::-1, ::-1]),
        (4, CORNERS[::-1]),
        (5, CORNERS.transpose(1, 0, 2)),
        (6, np.rot90(CORNERS, -1)),
        (7, np.rot90(CORNERS, 2).transpose(1, 0, 2)),
        (8, np.rot90(CORNERS)),
        (9, CORNERS),
    ],
)
def test_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int, upright: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image{suffix}"
    Image.fromarray(CORNERS).save(path, exif=exif)
    pixels = read_image(path).transpose(1, 2, 0).astype(int)
    assert pixels.shape == upright.shape
    assert np.abs(pixels - upright).mean() < 5


def test_exif_data_that_cannot_be_read_count_as_none(tmp_path: Path) -> None:
    Image.fromarray(CORNERS).save(tmp_path / "image.png", exif=b"Exif\0\0nonsense")
    assert np.array_equal(read_image(tmp_path / "image.png"), CORNERS.transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp", ".png"])
def test_the_first_of_several_images_is_read(tmp_path: Path, suffix: str) -> None:
    path, frames = tmp_path / f"image{suffix}", [Image.new("RGB", (8, 6), (level,) * 3) for level in (40, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert abs(int(read_image(path).mean()) - 40) < 4


def test_suffixes_are_those_that_pillow_decodes_by_itself() -> None:
    found = image_suffixes()
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".mpo", ".ppm"} <= found
    assert not found & {".eps", ".ps", ".h5", ".hdf", ".mpg", ".wmf", ".grib", ".pdf", ".db", ""}


@pytest.mark.parametrize("suffix", [".webp", ".tif", ".bmp", ".gif", ".PNG"])
def test_a_folder_has_files_of_all_formats(tmp_path: Path, suffix: str) -> None:
    write_folder(tmp_path)
    with_it = len(load("folder", tmp_path, val=0).train)
    write_image(tmp_path / "train" / "cat" / f"more{suffix}")
    assert len(load("folder", tmp_path, val=0).train) == with_it + 1


def test_a_file_that_needs_another_program_is_refused_whatever_its_name(tmp_path: Path) -> None:
    COLOUR.save(tmp_path / "image.eps")
    path = (tmp_path / "image.eps").rename(tmp_path / "image.png")
    with pytest.raises(ShoalError, match=r"found no readable image at .*cannot identify image file"):
        read_image(path)


# ---- sizes


def resized(width: int, height: int) -> np.ndarray:
    return np.asarray(COLOUR.resize((width, height), Image.Resampling.BILINEAR))


def padded(inner: np.ndarray, size: tuple[int, int], top: int, left: int) -> np.ndarray:
    black = np.zeros((*size, 3), np.uint8)
    black[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return black


# The picture is 8 wide and 6 high.
SIZES = [
    ("stretch", (6, 8), resized(8, 6)),
    ("crop", (6, 8), resized(8, 6)),
    ("pad", (6, 8), resized(8, 6)),
    ("stretch", (4, 5), resized(5, 4)),
    ("crop", (3, 3), resized(4, 3)[:, :3]),  # round(0.5) is 0, as in torchvision
    ("crop", (6, 6), resized(8, 6)[:, 1:7]),
    ("crop", (12, 6), resized(16, 12)[:, 5:11]),
    ("crop", (3, 8), resized(8, 6)[2:5]),
    ("crop", (5, 5), resized(6, 5)[:, :5]),
    ("pad", (8, 8), padded(resized(8, 6), (8, 8), 1, 0)),
    ("pad", (4, 4), padded(resized(4, 3), (4, 4), 0, 0)),
    ("pad", (3, 9), padded(resized(4, 3), (3, 9), 0, 2)),
    ("pad", (12, 8), padded(resized(8, 6), (12, 8), 3, 0)),
    ("pad", (1, 40), padded(resized(1, 1), (1, 40), 0, 19)),
    ("crop", (40, 1), resized(53, 40)[:, 26:27]),
]


@pytest.mark.parametrize(("fit", "size", "expected"), SIZES)
def test_images_are_brought_to_a_size(tmp_path: Path, fit: str, size: tuple[int, int], expected: np.ndarray) -> None:
    COLOUR.save(tmp_path / "image.png")
    pixels = read_image(tmp_path / "image.png", size=size, fit=fit)
    assert pixels.shape == (3, *size)
    assert np.array_equal(pixels, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_read_by_the_rule(tmp_path: Path, fit: str, channels: int) -> None:
    write_folder(tmp_path)
    COLOUR.save(tmp_path / "train" / "cat" / "odd.png")
    data = load("folder", tmp_path, val=0, size=(5, 4), fit=fit, channels=channels)
    assert (data.shape, data.fit) == ((channels, 5, 4), fit)
    expected = read_image(tmp_path / "train" / "cat" / "odd.png", channels, size=(5, 4), fit=fit)
    assert any(np.array_equal(image.numpy(), expected) for image in data.train.images)


def test_a_folder_without_a_size_has_no_rule_and_one_size_stretches(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert load("folder", tmp_path).fit is None
    assert load("folder", tmp_path, size=4).fit == "stretch"
    assert load("digits", size=(8, 6)).shape == (1, 8, 6)
    assert load("digits", size=8).fit is None  # its images come from no file


def test_images_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    write_folder(tmp_path)
    COLOUR.save(tmp_path / "train" / "dog" / "odd.png")
    with pytest.raises(ShoalError, match=r"found an image of 8x6 at .*odd\.png; need 8x8 like .*--size"):
        load("folder", tmp_path)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("folder", {"fit": "crop"}, "fit crop without a size; .*--size"),
        ("folder", {"size": 8, "fit": "squeeze"}, "'squeeze' at fit; need one of stretch, crop, pad"),
        ("folder", {"channels": 2}, "found 2 at channels; need 1 .*or 3"),
        ("folder", {"size": (8, 0)}, "found 0 at size"),
        ("digits", {"channels": 1}, "found channels 1 for digits; need .*folder"),
        ("digits", {"size": 8, "fit": "pad"}, "found fit pad for digits"),
        ("modelnet10", {"size": (8, 8)}, "found size 8x8 for modelnet10; need one number of points"),
    ],
)
def test_impossible_sizes_rules_and_channels_are_refused(
    tmp_path: Path, name: str, arguments: dict[str, object], match: str
) -> None:
    write_folder(tmp_path)
    with pytest.raises(ShoalError, match=match):
        load(name, tmp_path, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"channels": 4}, "found 4 at channels"),
        ({"size": (0, 4)}, "found 0x4 at size"),
        ({"size": (4, 4), "fit": ["crop"]}, "at fit; need one of"),
    ],
)
def test_bad_arguments_are_refused_before_the_file_is_read(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ShoalError, match=match):
        read_image("/nowhere.png", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_unreadable_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ShoalError, match=r"found no readable image at .*x\.png.*; need"):
        read_image(tmp_path / "x.png")
