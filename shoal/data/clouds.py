"""Readers of point clouds in ModelNet's published layouts: OFF meshes, and resampled points as text.

`ModelNet40/<class>/{train,test}/*.off` are triangle meshes, from which points are sampled. In
`modelnet40_normal_resampled`, each shape is a text file of points x,y,z,nx,ny,nz (Qi et al., *PointNet++*, NIPS'17).
Both give `Arrays`: float32 clouds [N, 3, P, 1], each with its centroid at 0 and its farthest point at distance 1, and
int64 labels [N]. Files are untrusted: one that does not follow its layout raises ShoalError, which names the file.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from shoal.data.folders import Listing, list_classes
from shoal.data.readers import Arrays, read_text
from shoal.errors import ShoalError


def is_cloud(shape: Sequence[int]) -> bool:
    """Whether `shape` is [C, P, 1], that of a cloud of P points, and not that of an image."""
    return len(shape) == 3 and shape[2] == 1 < shape[1]


Mesh = tuple[np.ndarray, np.ndarray]
"""Vertices float64 [V, 3], and triangles int64 [T, 3] as positions of vertices."""
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")


def parse_off(text: str, where: str) -> Mesh:
    """The mesh in an OFF file; a face with more than three corners becomes a fan of triangles.

    The header may run into the counts, as in some files of ModelNet40. Raises ShoalError, naming the file `where`, for
    another header, a number of values that does not match the counts, corners that are not vertices, and values that
    are not finite.
    """
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    body = "\n".join(line for line in lines if line)
    if not body.startswith("OFF"):
        raise _bad(f"first characters {body[:8]!r}", where, "the header OFF")
    values = _numbers(body[3:], where)
    if len(values) < 3 or (values[:2] % 1).any() or values[0] < 3 or values[1] < 1:
        raise _bad(f"counts {values[:3].tolist()}", where, "at least 3 vertices and 1 face")
    vertices, faces = int(values[0]), int(values[1])
    if len(values) < 3 + 3 * vertices + 4 * faces:
        raise _bad(f"{len(values)} numbers", where, f"all of its {vertices} vertices and {faces} faces")
    triangles = _triangles(values[3 + 3 * vertices :], faces, where)
    if (triangles < 0).any() or (triangles >= vertices).any() or (triangles % 1).any():
        raise _bad("a corner that is not a vertex", where, f"corners in 0..{vertices - 1}")
    return values[3 : 3 + 3 * vertices].reshape(-1, 3), triangles.astype(np.int64)


def _bad(found: str, where: str, need: str) -> ShoalError:
    return ShoalError(f"found {found} at {where}; need {need}; fetch the file again, or remove it")


def _numbers(text: str, where: str) -> np.ndarray:
    """All numbers in `text`, which are separated by white space, float64 [K]."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy only warns about text that it cannot read
            values = np.fromstring(text, dtype=np.float64, sep=" ")
    except (DeprecationWarning, ValueError) as error:
        raise _bad("something other than numbers", where, "numbers after the header") from error
    if not (np.abs(values) < 1e30).all():  # false for NaN, too; squares of larger values exceed float32
        raise _bad("numbers that are not finite, or beyond 1e30", where, "finite ones")
    return values


def _triangles(values: np.ndarray, faces: int, where: str) -> np.ndarray:
    """Triangles float64 [T, 3] of `faces` polygons; each is written as its number of corners, then the corners."""
    if len(values) == 4 * faces and (values[::4] == 3).all():
        return values.reshape(-1, 4)[:, 1:]
    fans, position = [], 0
    for _ in range(faces):
        corners = int(values[position]) if position < len(values) else 0
        face = values[position + 1 : position + 1 + corners]
        if corners < 3 or len(face) < corners:
            raise _bad(f"a face of {corners} corners, or cut off,", where, "faces of 3 or more corners each")
        fans += [(face[0], face[i], face[i + 1]) for i in range(1, corners - 1)]
        position += 1 + corners
    if position != len(values):
        raise _bad(f"{len(values) - position} numbers after the last face", where, "faces without colours")
    return np.array(fans)


def sample_surface(mesh: Mesh, count: int, generator: np.random.Generator, where: str = "a mesh") -> np.ndarray:
    """Sample points [count, 3], float64, uniformly over the mesh's area (Osada et al., TOG'02, eq. 1).

    Raises ShoalError when the mesh has no area.
    """
    corners = mesh[0][mesh[1]]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    total = areas.sum()
    if not total > 0:
        raise _bad("no area", where, "a surface to sample points from")
    chosen = corners[generator.choice(len(areas), size=count, p=areas / total)]
    root, part = np.sqrt(generator.random((count, 1))), generator.random((count, 1))
    return (1 - root) * chosen[:, 0] + root * (1 - part) * chosen[:, 1] + root * part * chosen[:, 2]


def unit_sphere(points: np.ndarray, where: str) -> np.ndarray:
    """Points float32 [P, 3], moved and scaled: centroid at 0, farthest point at distance 1.

    Raises ShoalError when all points are equal.
    """
    centred = points - points.mean(axis=0)
    radius = np.linalg.norm(centred, axis=1).max()
    if not radius > 0:
        raise _bad("only equal points", where, "at least two different points")
    return (centred / radius).astype(np.float32)


def read_mesh(path: Path, count: int) -> np.ndarray:
    """A cloud float32 [count, 3] sampled from an OFF file. The file name is the seed, so the cloud is always the same.

    Raises ShoalError when the file is not a mesh with some area.
    """
    mesh = parse_off(read_text(path), str(path))
    generator = np.random.default_rng(zlib.crc32(path.name.encode()))
    return unit_sphere(sample_surface(mesh, count, generator, str(path)), str(path))


def read_points(path: Path, count: int) -> np.ndarray:
    """A cloud float32 [count, 3] of the first `count` lines of a resampled shape; normals are dropped.

    Raises ShoalError when the file has fewer points or is not in this layout.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            rows = [line.split(",") for line in islice(file, count)]
        values = np.array([[float(cell) for cell in row] for row in rows])
    except (OSError, ValueError) as error:  # ValueError: text that is not UTF-8, or rows of different lengths
        raise _bad(f"no readable points ({error})", str(path), "rows x,y,z,nx,ny,nz") from error
    if values.ndim != 2 or values.shape[1] not in (3, 6) or not (np.abs(values) < 1e30).all():
        raise _bad(f"an array of shape {values.shape}, or values not finite,", str(path), "finite rows x,y,z,nx,ny,nz")
    if len(values) < count:
        raise _bad(f"{len(values)} points", str(path), f"at least {count}, or another size=")
    return unit_sphere(values[:, :3], str(path))


def read_meshes(folder: Path, count: int) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Training and test arrays and the names of the classes of `folder`/<class>/{train,test}/*.off.

    Labels are positions in the sorted class names. Raises ShoalError when files are missing or damaged.
    """
    names = list_classes(folder)

    def part(split: str) -> Arrays:
        files = [(p, i) for i, name in enumerate(names) for p in sorted((folder / name / split).glob("*.off"))]
        return _read(files, read_mesh, count, f"{folder}/*/{split}")

    return part("train"), part("test"), tuple(names)


def read_resampled(folder: Path, name: str, count: int) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Training and test arrays and the names of the classes of the text layout.

    The files `name`_shape_names.txt, `name`_train.txt and `name`_test.txt in `folder` list the classes and shapes;
    labels are positions in the first list. Raises ShoalError when files are missing or damaged.
    """
    listed = folder / f"{name}_shape_names.txt"
    classes = {line: i for i, line in enumerate(read_text(listed).split())}

    def part(split: str) -> Arrays:
        path = folder / f"{name}_{split}.txt"
        files = [_listed(folder, shape, classes, path) for shape in read_text(path).split()]
        return _read(files, read_points, count, str(path))

    return part("train"), part("test"), tuple(classes)


def _listed(folder: Path, shape: str, classes: dict[str, int], where: Path) -> tuple[Path, int]:
    """The file and the label of a shape with a name such as flower_pot_0001."""
    kind = shape.rpartition("_")[0]
    if kind not in classes or not _PLAIN.fullmatch(shape):  # the name becomes a path
        raise _bad(f"shape {shape!r}", str(where), "CLASS_NUMBER of a class in the list of shape names")
    return folder / kind / f"{shape}.txt", classes[kind]


def _read(files: Listing, read: Callable[[Path, int], np.ndarray], count: int, where: str) -> Arrays:
    if not files:
        raise ShoalError(f"found no shape at {where}; need at least one; put the set there as it is published")
    clouds = np.stack([read(path, count) for path, _ in files])
    labels = torch.tensor([label for _, label in files])
    return torch.from_numpy(clouds).transpose(1, 2).contiguous().unsqueeze(3), labels
