"""Small point cloud sets in ModelNet's two layouts, which tests write."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CUBE = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)
CUBE_FACES = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
TETRAHEDRON = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=float)
TETRAHEDRON_FACES = [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]
SHAPES: dict[str, tuple[np.ndarray, list[list[int]]]] = {
    "cube": (CUBE, CUBE_FACES),
    "plate": (CUBE * [1, 1, 0.02], CUBE_FACES),
    "rod": (CUBE * [0.1, 0.1, 1], CUBE_FACES),
    "tetrahedron": (TETRAHEDRON, TETRAHEDRON_FACES),
}


def off(vertices: np.ndarray, faces: list[list[int]], head: str = "OFF\n") -> str:
    rows = [" ".join(f"{v:.6f}" for v in vertex) for vertex in vertices]
    rows += [" ".join(map(str, [len(face), *face])) for face in faces]
    return f"{head}{len(vertices)} {len(faces)} 0\n" + "\n".join(rows) + "\n"


def write_meshes(folder: Path, train: int = 16, test: int = 8) -> Path:
    """Every shape many times, each stretched a little in its own way."""
    generator = np.random.default_rng(0)
    for name, (vertices, faces) in SHAPES.items():
        for part, count in (("train", train), ("test", test)):
            for i in range(count):
                path = folder / "ModelNet40" / name / part / f"{name}_{i + (part == 'test') * train:04d}.off"
                path.parent.mkdir(parents=True, exist_ok=True)
                stretched = vertices * generator.uniform(0.8, 1.25, 3)
                path.write_text(off(stretched, faces, "OFF" if i % 2 else "OFF\n# made by a test\n"))
    return folder


def write_text_layout(root: Path, kind: str = "modelnet40", rows: int = 20) -> Path:
    folder, generator = root / "modelnet40_normal_resampled", np.random.default_rng(0)
    names = {part: [f"{c}_{i:04d}" for c in ("lamp", "flower_pot") for i in n] for part, n in PARTS.items()}
    for shape in (*names["train"], *names["test"]):
        path = folder / shape.rpartition("_")[0] / f"{shape}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(",".join(f"{v:.6f}" for v in row) + "\n" for row in generator.normal(size=(rows, 6))))
    for part, shapes in names.items():
        (folder / f"{kind}_{part}.txt").write_text("\n".join(shapes) + "\n")
    (folder / f"{kind}_shape_names.txt").write_text("lamp\nflower_pot\n")
    return folder


PARTS = {"train": range(1, 7), "test": range(7, 9)}
