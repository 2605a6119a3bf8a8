"""Point clouds: ModelNet's layouts, dynamic graphs, ResGCN, and self-distillation on shapes that the tests make."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from shoal import data as sets
from shoal.attention_exits import feature_taps
from shoal.augment import augment_batch
from shoal.cli import app
from shoal.cost import cost
from shoal.data import Dataset, load
from shoal.early.figures import exit_figures
from shoal.errors import ShoalError
from shoal.exit_points import exit_points
from shoal.models import CLOUDS, NAMES, build
from shoal.models.point_graph import EdgeFeatures, nearest
from shoal.models.resgcn import EdgeConv
from shoal.point_clouds import parse_off, read_points, sample_surface
from shoal.pooled_exits import add_pooled_exits
from shoal.recipes import self_distill
from shoal.recipes.self_distill import Options, Preset
from shoal.run import Run
from shoal.spec import Spec, assemble
from shoal.stages import StoppedError
from shoal.surgery import trace
from shoal.train import Schedule, Settings

POINTS = 48
SHAPE = (3, POINTS, 1)
OPTIONS = Options(baseline=False)
PLAN = Preset(Schedule(8, 0.05, kind="cosine", batch_size=16), release=1)

# -- shapes as OFF meshes -----------------------------------------------------------------------------------

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


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load("modelnet40", write_meshes(tmp_path_factory.mktemp("meshes")), size=POINTS)


# -- readers ------------------------------------------------------------------------------------------------


def test_meshes_are_read_centred_and_scaled(shapes: Dataset) -> None:
    assert [len(part) for part in (shapes.train, shapes.val, shapes.test)] == [58, 6, 32]
    assert (shapes.shape, shapes.classes, shapes.augment) == (SHAPE, 4, "scale-shift")
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
    (TRIANGLE.replace("1 2", "1 -1"), "a corner that is no vertex"),
    (TRIANGLE.replace("1 2", "1 1.5"), "a corner that is no vertex"),
    (TRIANGLE.replace("1 2", "1 1e29"), "a corner that is no vertex"),
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
    ("1,2,3\n" * 3, "the same point again and again"),
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


# -- graphs and networks ------------------------------------------------------------------------------------


def brute_force(cloud: Tensor, k: int, dilation: int) -> list[list[int]]:
    """Every d-th of the k d nearest points of each, by sorting all distances."""
    order = [sorted(range(cloud.shape[1]), key=lambda j: float((cloud[:, i] - cloud[:, j]).norm())) for i in ALL]
    return [found[: k * dilation : dilation] for found in order]


ALL = range(24)


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_dilated_neighbours_are_those_of_brute_force(dilation: int) -> None:
    clouds = torch.randn(2, 5, len(ALL), 1, dtype=torch.float64)
    edges = EdgeFeatures(4, dilation).eval()(clouds)
    assert edges.shape == (2, 10, len(ALL), 4)
    for cloud, found in zip(clouds[..., 0], edges, strict=True):
        where = torch.tensor(brute_force(cloud, 4, dilation))
        assert torch.equal(found[:5], cloud[:, :, None].expand(-1, -1, 4))
        assert torch.allclose(found[5:], cloud[:, where] - cloud[:, :, None])
    assert torch.equal(nearest(clouds[..., 0], 1)[..., 0], torch.arange(len(ALL)).expand(2, -1))


def test_small_clouds_have_the_dilation_that_they_can_and_tiny_ones_none() -> None:
    clouds = torch.randn(2, 3, 9, 1)
    assert torch.equal(EdgeFeatures(4, 7).eval()(clouds), EdgeFeatures(4, 2).eval()(clouds))
    for bad in (clouds[:, :, :3], torch.zeros(1, 3, 8, 8)):
        with pytest.raises(ShoalError, match="at a graph of 4 neighbours; need clouds"):
            EdgeFeatures(4)(bad)
    with pytest.raises(ShoalError, match="fails on images of shape"):
        trace(build("resgcn8", 4, width=0.1), (3, 8, 1))


def test_training_now_and_then_draws_neighbours_from_all_ranks() -> None:
    clouds, edges = torch.randn(1, 3, 32, 1), EdgeFeatures(4, 4, epsilon=0.5)
    regular = edges.eval()(clouds)
    same = [torch.equal(edges.train()(clouds), regular) for _ in range(64)]
    assert 10 < sum(same) < 54
    assert torch.equal(edges.eval()(clouds), regular)


def test_an_edge_convolution_by_hand() -> None:
    """Points 0, 1, 3 on a line with k = 2: max over {i, nearest of i} of ReLU(2 x_i - 3 (x_j - x_i))."""
    layer = EdgeConv(1, 1).eval()
    layer.edges.k = 2
    with torch.no_grad():
        layer.conv.weight.copy_(torch.tensor([2.0, -3.0]).reshape(1, 2, 1, 1))
    out = layer(torch.tensor([0.0, 1.0, 3.0]).reshape(1, 1, 3, 1)).flatten() * (1 + layer.bn.eps) ** 0.5
    # i = 0: j in {0, 1}: 0, -3 -> 0.  i = 1: j in {1, 0}: 2, 2 + 3 = 5.  i = 3: j in {3, 1}: 6, 6 + 6 = 12.
    assert out.tolist() == pytest.approx([0.0, 5.0, 12.0])


def parameters(depth: int, width: float, classes: int) -> int:
    c, f, g, h = (round(size * width) for size in (64, 1024, 512, 256))
    layers = 6 * c + 2 * c + (depth - 1) * (2 * c * c + 2 * c)
    return layers + depth * c * f + 2 * f + 2 * f * g + 2 * g + g * h + 2 * h + h * classes + classes


@pytest.mark.parametrize("name", CLOUDS)
def test_counts_are_those_of_the_formula(name: str) -> None:
    depth = int(name.removeprefix("resgcn"))
    for width in (1.0, 0.25):
        network = build(name, 40, width=width)
        assert sum(p.numel() for p in network.parameters()) == parameters(depth, width, 40)
    total = cost(trace(build(name, 40), SHAPE))
    assert total.params == parameters(depth, 1, 40)
    assert total.macs == POINTS * (16 * (6 * 64 + (depth - 1) * 128 * 64) + depth * 64 * 1024)
    assert total.relus == POINTS * (16 * depth * 64 + 1024) + 512 + 256
    assert sum("k-NN graph" in name for name in total.unknown) == depth
    assert name not in NAMES


def test_logits_do_not_depend_on_the_order_of_points() -> None:
    network = assemble(Spec("resgcn8", 5, SHAPE, 0.1, exits=("blocks.1.out",), exit_kind="pooled")).double().eval()
    clouds = torch.randn(3, *SHAPE, dtype=torch.float64)
    for a, b in zip(network(clouds), network(clouds[:, :, torch.randperm(POINTS)]), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_gradients_are_finite_and_reach_every_parameter() -> None:
    network = assemble(Spec("resgcn8", 5, SHAPE, 0.1, exits=("blocks.1.out",), exit_kind="pooled"))
    torch.cat(network(torch.randn(4, *SHAPE)), dim=1).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_network_for_clouds_has_no_resolution() -> None:
    with pytest.raises(ShoalError, match=r"found resolution 0\.5 for resgcn8; need 1"):
        build("resgcn8", 4, resolution=0.5)
    with pytest.raises(ShoalError, match="try resgcn"):
        build("resgcn", 4)


# -- classifiers on clouds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layers"), [("resgcn8", (1, 3)), ("resgcn12", (2, 6)), ("resgcn16", (4, 9))])
def test_shallow_classifiers_go_after_thirds_of_the_layers(name: str, layers: tuple[int, int]) -> None:
    network, settled = build(name, 4, width=0.05), Options().settled(SHAPE)
    assert (settled.kind, settled.scheme, settled.count) == ("pooled", "uniform", 2)
    expected = tuple(f"blocks.{i}.out" for i in layers)
    assert exit_points(network, SHAPE, "uniform", 2) == expected
    assert len(exit_points(network, SHAPE, "every-block")) == len(network.blocks) - 1


def test_images_have_the_papers_exits_unless_others_are_asked_for() -> None:
    settled = Options().settled((3, 32, 32))
    assert (settled.kind, settled.scheme, settled.count) == ("attention", "downsample", None)
    own = Options(scheme="deep", kind="plain", count=1)
    assert own.settled((3, 32, 32)) == own.settled(SHAPE) == own
    assert Options(after=("blocks.0.out",)).settled(SHAPE).count is None


def test_pooled_exits_have_features_like_the_final_classifiers() -> None:
    network = add_pooled_exits(build("resgcn8", 4, width=0.1), ["blocks.1.out"], 4, SHAPE)
    assert feature_taps(network) == ("exits.blocks_1_out.features", "exits.final.features")
    assert [tuple(z.shape) for z in network(torch.randn(2, *SHAPE))] == [(2, 4), (2, 4)]
    own = {k: v.shape for k, v in network.state_dict().items() if k.startswith("exits.blocks_1_out")}
    assert own["exits.blocks_1_out.hidden.weight"] == (26, 2 * 6)


@pytest.mark.parametrize("kind", ["attention", "aligned", "plain"])
def test_exits_of_convolutions_are_refused_on_clouds(kind: str) -> None:
    options = replace(OPTIONS, kind=kind, feature_weight=0.0 if kind == "plain" else None)
    with pytest.raises(ShoalError, match=r"for clouds of 48 points; need .*; use exits of kind pooled"):
        self_distill.distill(Spec("resgcn8", 4, SHAPE, 0.1), fake(), options, PLAN, Settings())


def fake() -> Dataset:
    part = sets.Split(torch.randn(4, *SHAPE), torch.arange(4))
    return Dataset("fake", part, part, part, 4, (0.0,) * 3, (1.0,) * 3, "none")


def test_every_classifier_learns_the_shapes(shapes: Dataset) -> None:
    spec = Spec("resgcn8", 4, SHAPE, 0.125)
    result = self_distill.distill(spec, shapes, OPTIONS, PLAN, Settings())
    rows = result.histories["self-distillation"].rows
    assert {"self_kd", "features", "exit0_cross_entropy"} <= rows[0].keys()
    found = exit_figures(result.model, shapes, shapes.test, Settings())
    assert [row["accuracy"] > 40 for row in found["exits"]] == [True] * 3  # chance is 25
    assert all(value > 40 for value in found["ensemble"].values())


def test_a_resumed_run_is_the_unbroken_one(shapes: Dataset, tmp_path: Path) -> None:
    spec, plan = Spec("resgcn8", 4, SHAPE, 0.0625), replace(PLAN, schedule=replace(PLAN.schedule, epochs=3))

    def distilled(folder: str, settings: Settings) -> dict[str, Tensor]:
        run = Run.create(tmp_path / folder, {}, resume=True)
        return dict(self_distill.distill(spec, shapes, OPTIONS, plan, settings, run=run).model.state_dict())

    whole = distilled("whole", Settings())
    asked = iter([False, False, True])
    with pytest.raises(StoppedError):
        distilled("broken", Settings(stop=lambda: next(asked)))
    again = distilled("broken", Settings(resume=True))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


# -- commands -----------------------------------------------------------------------------------------------


def shoal(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_trains_saves_and_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "POINTS", 32)
    root, out = write_meshes(tmp_path, train=10, test=4), tmp_path / "run"
    words = ("self-distill", "resgcn8", "--data", "modelnet40", "--data-dir", root, "--width", 0.1, "--epochs", 2)
    bad = shoal(*words, "--preset", "paper", "--out", out)
    assert "found 'crop-flip-autoaugment' at augment for point clouds" in str(bad.exception)
    wrong = shoal("train", "resnet10", *words[2:], "--out", out)
    assert "found resnet10 for point clouds; need one of resgcn8, resgcn12" in str(wrong.exception)
    assert not out.exists()
    done = shoal(*words, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert body["after"] == ["blocks.1.out", "blocks.3.out"]
    assert len(body["exits"]) == 3
    assert Run(out).load_model()[0].exit_kind == "pooled"
    alone = shoal("evaluate", out / "exits" / "1", "--json")
    assert json.loads(alone.stdout)["accuracy"] == pytest.approx(body["exits"][0]["accuracy"])
    refused = shoal("compile", out / "exits" / "3", "--out", tmp_path / "artifact")
    assert "dynamic k-NN graph" in str(refused.exception)


COMMANDS: list[tuple[str, Callable[[dict[str, Any]], bool]]] = [
    ("count", lambda body: body["params"] == parameters(8, 1, 10) and len(body["unknown"]) == 17),
    ("check", lambda body: not body["private"] and "k-NN" in json.dumps(body["refused"])),
]


@pytest.mark.parametrize(("command", "expected"), COMMANDS)
def test_networks_for_clouds_are_counted_and_refused_in_private(command: str, expected: Any) -> None:
    done = shoal(command, "resgcn8", "--json")
    assert done.exit_code == 0, done.output
    assert expected(json.loads(done.stdout))
