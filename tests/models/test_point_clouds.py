"""Point clouds: dynamic graphs, ResGCN, and self-distillation on shapes that the tests make."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.data import loading as sets
from shoal.data.dataset import Dataset
from shoal.data.loading import load
from shoal.errors import ShoalError, StoppedError
from shoal.exits.attention import feature_taps
from shoal.exits.figures import exit_figures
from shoal.exits.points import exit_points
from shoal.exits.pooled import add_pooled_exits
from shoal.graph.counting import cost
from shoal.models import CLOUDS, NAMES, build
from shoal.models.point_graph import EdgeFeatures, nearest
from shoal.models.resgcn import EdgeConv
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network
from shoal.recipes import self_distill
from shoal.recipes.self_distill import Options, Preset
from shoal.recipes.stages import Stages
from shoal.storage.run import Run
from shoal.surgery.tracing import trace
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.support.clouds import write_meshes

POINTS = 48
SHAPE = (3, POINTS, 1)
OPTIONS = Options(baseline=False)
PLAN = Preset(Schedule(8, 0.05, kind="cosine", batch_size=16), release=1)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load("modelnet40", write_meshes(tmp_path_factory.mktemp("meshes")), size=POINTS)


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
        self_distill.distill(Spec("resgcn8", 4, SHAPE, 0.1), options, PLAN, Stages(fake(), Settings()))


def fake() -> Dataset:
    part = sets.Split(torch.randn(4, *SHAPE), torch.arange(4))
    return Dataset("fake", part, part, part, 4, (0.0,) * 3, (1.0,) * 3, "none")


@pytest.mark.slow
def test_every_classifier_learns_the_shapes(shapes: Dataset) -> None:
    spec = Spec("resgcn8", 4, SHAPE, 0.125)
    result = self_distill.distill(spec, OPTIONS, PLAN, Stages(shapes, Settings()))
    rows = result.histories["self-distillation"].rows
    assert {"self_kd", "features", "exit0_cross_entropy"} <= rows[0].keys()
    found = exit_figures(result.model, shapes, shapes.test, Settings())
    assert [row["accuracy"] > 40 for row in found["exits"]] == [True] * 3  # chance is 25
    assert all(value > 40 for value in found["ensemble"].values())


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_one(shapes: Dataset, tmp_path: Path) -> None:
    spec, plan = Spec("resgcn8", 4, SHAPE, 0.0625), replace(PLAN, schedule=replace(PLAN.schedule, epochs=3))

    def distilled(folder: str, settings: Settings) -> dict[str, Tensor]:
        run = Run.create(tmp_path / folder, {}, resume=True)
        return dict(self_distill.distill(spec, OPTIONS, plan, Stages(shapes, settings, run)).model.state_dict())

    whole = distilled("whole", Settings())
    asked = iter([False, False, True])
    with pytest.raises(StoppedError):
        distilled("broken", Settings(stop=lambda: next(asked)))
    again = distilled("broken", Settings(resume=True))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


# -- commands -----------------------------------------------------------------------------------------------


def shoal(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.slow
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
    assert load_network(Run(out))[0].exit_kind == "pooled"
    alone = shoal("evaluate", out / "exits" / "1", "--json")
    assert json.loads(alone.stdout)["accuracy"] == pytest.approx(body["exits"][0]["accuracy"])
    refused = shoal("compile", out / "exits" / "3", "--out", tmp_path / "artifact")
    assert "dynamic k-NN graph" in str(refused.exception)


COMMANDS: list[tuple[str, Callable[[dict[str, Any]], bool]]] = [
    ("count", lambda body: body["params"] == parameters(8, 1, 10) and len(body["unknown"]) == 16),
    ("check", lambda body: not body["private"] and "k-NN" in json.dumps(body["refused"])),
]


@pytest.mark.parametrize(("command", "expected"), COMMANDS)
def test_networks_for_clouds_are_counted_and_refused_in_private(command: str, expected: Any) -> None:
    done = shoal(command, "resgcn8", "--json")
    assert done.exit_code == (1 if command == "check" else 0), done.output  # of check: the answer is no
    assert expected(json.loads(done.stdout))
