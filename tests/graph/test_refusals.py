"""Models, files and operations that a graph does not take: refused in one sentence, or reported as unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from shoal.errors import ShoalError
from shoal.exits.classifiers import add_exits, keep_exit
from shoal.graph.counting import cost
from shoal.graph.graph import Graph
from shoal.models import build
from shoal.reduction.gates import add_branches, set_gate
from shoal.reduction.masks import add_masks
from shoal.surgery.normal_form import normalise, replace
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import trace

SHAPE = (1, 8, 8)


def gap(a: object, b: object) -> float:
    last = [(t[-1] if isinstance(t, tuple) else t).detach() for t in (a, b)]  # type: ignore[attr-defined]
    return float((last[0] - last[1]).abs().max())


class Looping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return torch.relu(x)


class NoRelu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def test_bad_models_get_one_sentence(residual: nn.Module, tmp_path: Path) -> None:
    rows = [
        (lambda: normalise(Looping()), r"test_refusals\.py:\d+ .*if x\.sum\(\) > 0"),
        (lambda: relu_sites(NoRelu(), SHAPE), "no ReLU"),
        (lambda: relu_sites(residual, (3, 8, 8)), "fails on images of shape"),
        (lambda: trace(residual, SHAPE)(torch.zeros(1, 1, 9, 9)), r"\(1, 9, 9\).*\(1, 8, 8\)"),
        (lambda: replace(residual, {"nothing": nn.ReLU()}), "no submodule 'nothing'"),
        (lambda: add_masks(residual, {"stem": torch.ones(4, 8, 8)}), "no ReLU site 'stem'"),
        (lambda: add_masks(residual, {}), "no masks"),
        (lambda: add_branches(residual, []), "no block"),
        (lambda: add_exits(residual, ["nowhere"], 4, SHAPE), "no site"),
        (lambda: keep_exit(residual, 3), "no exit 3"),
        (lambda: set_gate(residual, 1.5), "gate 1.5"),
        (lambda: build("resnet19", 10), "resnet18"),
        (lambda: Graph.load(tmp_path), "JSON"),
    ]
    for act, pattern in rows:
        with pytest.raises(ShoalError, match=pattern):
            act()


def test_damaged_graphs_are_refused(residual: nn.Module, tmp_path: Path) -> None:
    trace(residual, SHAPE).save(tmp_path)
    text, blob = (tmp_path / "graph.json").read_text(), (tmp_path / "graph.safetensors").read_bytes()
    for damaged in (text[:50], text.replace("shoal-graph-1", "other"), text.replace('"inputs"', '"in"'), "[]"):
        (tmp_path / "graph.json").write_text(damaged)
        with pytest.raises(ShoalError, match="found"):
            Graph.load(tmp_path)
    (tmp_path / "graph.json").write_text(text)
    (tmp_path / "graph.safetensors").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(ShoalError, match="unreadable weight file"):
        Graph.load(tmp_path)


WRONG: list[object] = [None, 5, -1, "text", [], ["text"], [0, 0], [10**30], {}, {"a": 1}]


@pytest.mark.slow
def test_every_field_of_a_graph_file_may_be_of_the_wrong_type(residual: nn.Module, tmp_path: Path) -> None:
    """Whatever takes the place of a field, or its absence: one sentence that names the file, or a network that runs."""
    graph = trace(residual, SHAPE)
    graph.save(tmp_path)
    path, x = tmp_path / "graph.json", torch.zeros(1, *SHAPE)
    body, truth = json.loads(path.read_text()), graph(x)[0]
    nodes = {n["op"]: n for n in body["nodes"]}  # one of each operation
    for holder in (body, *nodes.values(), *(n["attrs"] for n in nodes.values())):
        for key, value in list(holder.items()):
            for wrong in (*WRONG, KeyError):
                holder[key] = wrong
                if wrong is KeyError:
                    del holder[key]
                path.write_text(json.dumps(body))
                try:
                    assert Graph.load(tmp_path)(x)[0].shape == truth.shape
                except ShoalError as error:
                    assert str(path) in str(error)  # noqa: PT017
            holder[key] = value


def test_weights_of_the_wrong_kind_are_refused(residual: nn.Module, tmp_path: Path) -> None:
    graph = trace(residual, SHAPE)
    for key in ("stem.weight", "bn.mean", "fc.weight"):
        for wrong in (torch.zeros(()), torch.zeros(3, 3), graph.weights[key].int(), None):
            weights = {k: w for k, w in graph.weights.items() if k != key} | ({} if wrong is None else {key: wrong})
            Graph(graph.nodes, weights, graph.outputs).save(tmp_path)
            with pytest.raises(ShoalError, match=rf"at {key.split('.')[0]} in {tmp_path}"):
                Graph.load(tmp_path)


def test_unknown_operations_are_reported_never_zero() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(torch.sigmoid(x)).flatten(1)

    graph = trace(Odd(), SHAPE)
    assert cost(graph).unknown == ("sigmoid (sigmoid)",)
    with pytest.raises(ShoalError, match="sigmoid"):
        graph(torch.zeros(1, *SHAPE))


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        return torch.cat([x, x + x], 1).mean((-1, 2))


UNLIKE = {
    "ceil_mode": lambda x: nn.functional.avg_pool2d(x, 3, ceil_mode=True),
    "divisor": lambda x: nn.functional.avg_pool2d(x, 2, divisor_override=3),
    "one dimension": lambda x: x.mean(1),
    "end_dim": lambda x: torch.flatten(x, 1, 2),
    "add alpha": lambda x: torch.add(x, x, alpha=2),
}


def test_repeated_operands_are_kept() -> None:
    x = torch.randn(2, *SHAPE)
    assert gap(trace(Twice(), SHAPE)(x), Twice()(x)) < 1e-6


@pytest.mark.parametrize("name", UNLIKE)
def test_forms_that_the_graph_does_not_have_are_unknown_not_wrong(name: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return UNLIKE[name](torch.relu(x))

    assert len(cost(trace(Odd(), SHAPE)).unknown) == 1
