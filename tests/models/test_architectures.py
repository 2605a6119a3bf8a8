"""Laws over networks as others write them: counting, masks, gates, folding and compiling, or a refusal by name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks.training.architectures import rows
from shoal.cli.app import app
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.graph.max_pool import expand_max_pools
from shoal.jobs.inspect import examine
from shoal.private.compiler.compilation import compile
from shoal.private.program.clear import run_clear
from shoal.reduction.budget import allocate
from shoal.reduction.gates import add_branches, branched_blocks, commit_branches, set_gate
from shoal.reduction.masks import add_masks
from shoal.surgery.normal_form import normalise
from shoal.surgery.sites import find_blocks, relu_sites
from shoal.surgery.substitution import substitute
from shoal.surgery.tracing import trace
from tests.conftest import randomise
from tests.support.architectures import ARCHITECTURES, SHAPE

ROOT = Path(__file__).parents[2]

REFUSED = {
    "MobileNetV2": r"found relu6 at features\.2; need ReLU, .*; train with --replace relu6=relu",
    "RegNetY": r"found sigmoid at sigmoid .architectures_cells.py:.*; need no gate: .*without squeeze-excite",
    "EfficientNet": r"found SiLU at 0\.2; need ReLU, .*; train with --replace silu=relu",
}
RUNNING = [name for name in ARCHITECTURES if name not in REFUSED]
BLOCKS = {"LeNet": 0, "AlexNet": 1, "VGG": 2, "NiN": 3, "SqueezeNet": 0, "GoogLeNet": 9, "MobileNet": 0}
BLOCKS |= {"ResNet": 3, "BottleneckResNet": 6, "ResNeXt": 0, "PreActResNet": 3, "WideResNet": 3, "SimpleDLA": 6}
BLOCKS |= {"DenseNet": 5, "ShuffleNet": 0, "RegNetX": 0, "RegNetY": 2, "Recurrent": 0, "FixupNet": 0}
"""conv - (bn) - ReLU - conv runs of plain square convolutions, found by reading; the stem's ReLU begins none."""


class Computed(TorchDispatchMode):
    """Counts the values that PyTorch's own operations give, whatever called them."""

    def __init__(self) -> None:
        super().__init__()
        self.values: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        if isinstance(first, torch.Tensor):
            self.values[func.overloadpacket.__name__.strip("_")] += first.numel()
        return result


def specimen(name: str) -> nn.Module:
    torch.manual_seed(2)
    return randomise(ARCHITECTURES[name]())


def images(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1.0))


@torch.no_grad()
def check_counts(model: nn.Module, graph: Graph) -> None:
    found, flops, computed = cost(graph), FlopCounterMode(display=False), Computed()
    with flops, computed:
        model(images(1))
    assert found.relus == computed.values["relu"]
    assert found.comparisons >= 3 * computed.values["max_pool2d_with_indices"] + 2 * computed.values["hardtanh"]
    assert 2 * (found.macs + found.linear_macs) == flops.get_total_flops()
    assert found.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_are_those_of_what_pytorch_computes(name: str) -> None:
    model = specimen(name)
    check_counts(model, trace(model, SHAPE))
    check_counts(model, trace(normalise(model), SHAPE))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masks_of_all_ones_and_closed_gates_change_nothing(name: str) -> None:
    model, x = specimen(name), images(3)
    truth = model(x)
    assert gap(normalise(model)(x), truth) < 1e-5
    if cost(trace(model, SHAPE)).relus == 0:
        with pytest.raises(ShoalError, match="found no ReLU in the model"):
            relu_sites(model, SHAPE)
        return
    sites = relu_sites(model, SHAPE)
    assert len({s.name for s in sites}) == len(sites)
    assert sum(s.relus for s in sites) == cost(trace(model, SHAPE)).relus
    masked = add_masks(model, {s.name: torch.ones(s.shape, dtype=torch.bool) for s in sites})
    assert gap(masked(x), truth) < 1e-5
    budget = allocate(sites, {s.name: 1.0 for s in sites}, sum(s.relus for s in sites) // 2)
    blocks = find_blocks(model, SHAPE)
    assert len(blocks) == BLOCKS.get(name, 0)
    if blocks:
        chosen = branched_blocks(blocks, budget, 2.0)
        grown = add_branches(masked, chosen)
        assert gap(grown(x), truth) < 1e-5
        set_gate(grown, 1.0)
        shallow = commit_branches(grown)
        assert gap(shallow(x), grown(x)) < 1e-5
        assert gap(shallow(x), truth) > 1e-3
        assert not {b.name for b in chosen} & {s.name for s in relu_sites(shallow, SHAPE)}


@torch.no_grad()
def check_private(model: nn.Module) -> None:
    x, graph = images(6), trace(model, SHAPE)
    truth = model(x)
    assert gap(graph(x)[0], truth) < 1e-5
    folded = fold(graph)
    assert gap(folded(x)[0], truth) < 1e-4
    assert not {n.op for n in folded} & {"batch_norm", "affine", "unknown"}
    again = fold(folded)
    assert again.nodes == folded.nodes
    assert all(torch.equal(again.weights[k], w) for k, w in folded.weights.items())
    assert cost(folded).comparisons == cost(expand_max_pools(folded)).relus - cost(folded).relus
    program, weights = compile(folded, images(12, seed=3))
    gaps = np.abs(run_clear(program, weights, x)[0] - truth.double().numpy())
    assert gaps.max() <= program.error_bound
    assert program.error_bound < 0.05 * float(truth.abs().max())


@pytest.mark.parametrize("name", RUNNING)
def test_folding_keeps_the_function_and_fixed_point_its_bound(name: str) -> None:
    check_private(specimen(name))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_by_name_with_what_to_do(name: str) -> None:
    with pytest.raises(ShoalError, match=REFUSED[name]):
        compile(fold(trace(specimen(name), SHAPE)), images(2))


def test_doing_as_a_refusal_says_makes_the_network_run() -> None:
    model = substitute(specimen("MobileNetV2"), {"relu6": "relu"})
    check_private(model)
    sites = {s.name: s.relus for s in relu_sites(model, SHAPE)}
    assert sites["features.2"] == 8 * 16 * 16
    assert sum(sites.values()) == 8 * 256 + 2 * 16 * 256 + 24 * (256 + 64) + 2 * 36 * 64


def test_hand_counts() -> None:
    found = cost(trace(specimen("LeNet"), SHAPE))
    assert found.relus == 6 * 28 * 28 + 16 * 10 * 10 + 60 + 42
    assert found.comparisons == 3 * (6 * 14 * 14 + 16 * 5 * 5)
    assert found.macs == 75 * 6 * 28 * 28 + 150 * 16 * 10 * 10
    assert found.linear_macs == 400 * 60 + 60 * 42 + 42 * 5
    dense = cost(trace(specimen("DenseNet"), SHAPE))
    assert dense.relus == 256 * (8 + 12 + 16 + 3 * 16 + 20) + 64 * (10 + 14 + 2 * 16 + 18)
    assert dense.depth == 1 + 2 * 3 + 1 + 2 * 2


def test_the_published_table_is_what_check_finds() -> None:
    body = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text())
    assert tuple(body["shape"]) == SHAPE
    assert body["networks"] == json.loads(json.dumps(rows()))


def test_check_says_what_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = ["check", "tests.support.architectures_cells:EfficientNet", "--input", "3x32x32"]
    body = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert body["private"] is False
    assert body["online"] is None
    assert [r["found"] for r in body["refused"]].count("SiLU") == 2
    assert {r["node"] for r in body["refused"]} >= {"0.2", "1.expand.2", "silu", "mul", "sigmoid"}
    text = CliRunner().invoke(app, words).stdout
    assert "cannot run in private" in text
    assert "--replace silu=relu" in " ".join(text.split())
    body = json.loads(CliRunner().invoke(app, [*words, "--replace", "silu=relu", "--json"]).stdout)
    assert {r["found"].split()[0] for r in body["refused"]} == {"mul", "sigmoid"}
    words[1] = "tests.support.architectures_cells:MobileNetV2"
    body = json.loads(CliRunner().invoke(app, [*words, "--replace", "relu6=relu", "--json"]).stdout)
    assert body["private"]
    assert body["comparisons"] == 0
    assert body["online"]["latencies"] > 3 * body["relu_layers"]


class Renamed(nn.Module):
    """`+=` changes what `x` names, too, which a trace does not see."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x = x.clone()
        y += 1
        return torch.relu(x).flatten(1)


def test_a_trace_that_computes_something_else_is_noticed() -> None:
    with pytest.raises(ShoalError, match="found that Renamed computes something else once traced"):
        examine(Renamed(), SHAPE)
