"""ModelNet's layouts: what is read, what is refused, and how clouds are augmented."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.data.augment import augment_batch
from shoal.data.clouds import parse_off, read_points, sample_surface
from shoal.data.dataset import Dataset
from shoal.data.loading import load
from shoal.errors import ShoalError
from tests.support.clouds import CUBE, CUBE_FACES, off, write_meshes, write_text_layout

POINTS = 48


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load("modelnet40", write_meshes(tmp_path_factory.mktemp("meshes")), size=POINTS)


def test_meshes_are_read_centred_and_scaled(shapes: Dataset) -> None:
    assert [len(part) for part in (shapes.train, shapes.val, shapes.test)] == [58, 6, 32]
    assert (shapes.shape, shapes.classes, shapes.augment) == ((3, POINTS, 1), 4, "scale-shift")
    clouds = shapes.train.images
    assert clouds.dtype == torch.float32
    assert torch.allclose(clouds.mean((2, 3)), torch.zeros(58, 3), atol=1e-6)
    assert torch.allclose(clouds.square().sum(1).sqrt().amax((1, 2)), torch.ones(58), atol=1e-6)
    assert shapes.normalise(clouds) is clouds


def test_a_file_gives_the_same_cloud_whatever_the_seed_and_the_other_files(tmp_path: Path) -> None:
    write_meshes(tmp_path, train=4, test=2)
    first, second = (load("modelnet40", tmp_path, size=20, seed=seed) for seed in (0, 1))
    assert torch.equal(first.test.images, second.test.images)
    (tmp_path / "ModelNet40" / "cube" / "test" / "cube_0004.off").unlink()
    assert torch.equal(load("modelnet40", tmp_path / "ModelNet40", size=20).test.images, first.test.images[1:])


def test_resampled_shapes_are_the_first_points_of_their_files(tmp_path: Path) -> None:
    folder = write_text_layout(tmp_path)
    for root in (tmp_path, folder):
        data = load("modelnet40", root, size=16, val=0)
        assert [len(part) for part in (data.train, data.val, data.test)] == [12, 0, 4]
        assert data.classes == 2
        assert data.train.labels.tolist() == [0] * 6 + [1] * 6
    points = np.loadtxt(folder / "flower_pot" / "flower_pot_0001.txt", delimiter=",")[:16, :3]
    points -= points.mean(0)
    points /= np.linalg.norm(points, axis=1).max()
    assert np.allclose(data.train.images[6, :, :, 0].numpy().T, points, atol=1e-6)


def test_modelnet10_is_listed_beside_modelnet40(tmp_path: Path) -> None:
    write_text_layout(tmp_path, "modelnet10")
    assert load("modelnet10", tmp_path, size=8).shape == (3, 8, 1)
    with pytest.raises(ShoalError, match=r"found no modelnet40 data at .*; need .*ModelNet40 there; fetch and unpack"):
        load("modelnet40", tmp_path, size=8)


def test_points_lie_on_the_surface_in_proportion_to_area_and_by_the_seed() -> None:
    mesh = parse_off(off(CUBE * [1, 1, 3], CUBE_FACES), "box")
    assert mesh[1].shape == (12, 3)
    a, b, c = (sample_surface(mesh, 6000, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert (a == b).all()
    assert (a != c).any()
    size = np.abs(a) / [1, 1, 3]
    assert np.allclose(size.max(1), 1)
    ends = np.isclose(size[:, 2], 1).mean()
    assert ends == pytest.approx(2 * 4 / (2 * 4 + 4 * 12), abs=0.02)  # both ends' share of the area
    upper = a[np.isclose(size[:, 2], 1)][:, :2]
    assert np.abs(upper.mean(0)).max() < 0.1  # uniform within a face
    assert upper.std(0) == pytest.approx([1 / 3**0.5] * 2, abs=0.05)


TRIANGLE = "OFF 3 1 0 0 0 0 1 0 0 0 1 0 3 0 1 2"
BAD_MESHES = [
    (TRIANGLE.replace("OFF", "PLY"), "found first characters 'PLY 3 1 "),
    ("", "found first characters ''"),
    ("OFF", "found counts"),
    ("OFF -3 1 0", "found counts"),
    ("OFF 2.5 1 0", "found counts"),
    ("OFF 1e29 1e29 0 0", "numbers at mesh; need all of its"),
    (TRIANGLE[:-2], "found 15 numbers at mesh; need all of its 3 vertices and 1 faces"),
    (TRIANGLE.replace("1 2", "1 3"), r"need corners in 0\.\.2"),
    (TRIANGLE.replace("1 2", "1 -1"), "a corner that is not a vertex"),
    (TRIANGLE.replace("1 2", "1 1.5"), "a corner that is not a vertex"),
    (TRIANGLE.replace("1 2", "1 1e29"), "a corner that is not a vertex"),
    (TRIANGLE.replace(" 3 0 1 2", " 4 0 1 2"), "a face of 4 corners, or cut off,"),
    (TRIANGLE.replace(" 3 0 1 2", " 2 0 1 2"), "a face of 2 corners"),
    (TRIANGLE + " 255 0 0", "found 3 numbers after the last face"),
    (TRIANGLE.replace("1 0 0 0", "nan 0 0 0"), "not finite"),
    (TRIANGLE.replace("1 0 0 0", "1e99 0 0 0"), "beyond 1e30"),
    (TRIANGLE.replace("1 0 0 0", "one 0 0 0"), "something other than numbers at mesh"),
]


@pytest.mark.parametrize(("text", "message"), BAD_MESHES)
def test_damaged_meshes_are_refused(text: str, message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        parse_off(text, "mesh")


def test_a_mesh_without_area_is_refused_by_its_name(tmp_path: Path) -> None:
    write_meshes(tmp_path, 1, 1)
    path = tmp_path / "ModelNet40" / "rod" / "train" / "rod_0000.off"
    path.write_text(TRIANGLE.replace("0 1 2", "0 1 1"))
    with pytest.raises(ShoalError, match=r"found no area at .*rod_0000\.off; need a surface"):
        load("modelnet40", tmp_path)
    path.write_bytes(b"OFF\xff\xfe")
    with pytest.raises(ShoalError, match=r"found no text file at .*rod_0000\.off"):
        load("modelnet40", tmp_path)
    for empty in (tmp_path / "ModelNet40").glob("*/test/*.off"):
        empty.unlink()
    path.write_text(off(CUBE, CUBE_FACES))
    with pytest.raises(ShoalError, match=r"found no shape at .*/test"):
        load("modelnet40", tmp_path, size=20)


BAD_ROWS = [
    ("1,2,3\n1,2\n1,2,3\n", "no readable points"),
    ("1,2,x\n" * 3, "no readable points"),
    ("1,2\n" * 3, r"an array of shape \(3, 2\)"),
    ("", r"an array of shape \(0,\)"),
    ("1,2,nan\n" * 3, "not finite"),
    ("1,2,3\n4,5,6\n", "found 2 points at .*; need at least 3, or another size="),
    ("1,2,3\n" * 3, "only equal points"),
]


@pytest.mark.parametrize(("text", "message"), BAD_ROWS)
def test_damaged_rows_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ShoalError, match=message):
        read_points(tmp_path / "a.txt", 3)


@pytest.mark.parametrize("shape", ["../../secret_0001", "vase_0001", "lamp", "/lamp_0001"])
def test_lists_that_name_other_files_are_refused(shape: str, tmp_path: Path) -> None:
    folder = write_text_layout(tmp_path)
    (folder / "modelnet40_test.txt").write_text(f"{shape}\n")
    with pytest.raises(ShoalError, match=r"found shape .* at .*modelnet40_test\.txt; need CLASS_NUMBER"):
        load("modelnet40", tmp_path, size=8)
    (folder / "modelnet40_test.txt").write_text("lamp_0099\n")
    with pytest.raises(ShoalError, match="lamp_0099"):
        load("modelnet40", tmp_path, size=8)


def test_clouds_are_scaled_and_moved_as_wholes() -> None:
    clouds = torch.randn(5, 3, 7, 1)
    moved = augment_batch(clouds, "scale-shift", torch.Generator().manual_seed(0))
    assert torch.equal(moved, augment_batch(clouds, "scale-shift", torch.Generator().manual_seed(0)))
    scale = moved.std(2, keepdim=True) / clouds.std(2, keepdim=True)
    shift = (moved - clouds * scale).mean(2, keepdim=True)
    assert torch.allclose(moved, clouds * scale + shift, atol=1e-5)
    assert 2 / 3 <= scale.min() <= scale.max() <= 1.5
    assert shift.abs().max() <= 0.2 + 1e-5
    with pytest.raises(ShoalError, match="found 'crop' at augment for point clouds; need one of none, scale-shift"):
        augment_batch(clouds, "crop", torch.Generator())
    with pytest.raises(ShoalError, match="found 'scale-shift' at augment for images"):
        augment_batch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "scale-shift", torch.Generator())
