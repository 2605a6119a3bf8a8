"""Channels cut by Torch-Pruning: the network is its own one, counts fall, runs are loaded without it, and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shoal.channels.cut import keep_channels
from shoal.channels.torch_pruning import cut_channels
from shoal.errors import ShoalError
from shoal.exits.attention import add_aligned_exits
from shoal.exits.cascades import cascade
from shoal.exits.classifiers import add_exits
from shoal.models import build
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec, pruned_spec
from shoal.networks.stored import load_network
from shoal.storage.run import Run
from shoal.surgery.normal_form import normalise
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import count
from tests.cli.test_commands import call
from tests.conftest import Residual, randomise
from tests.jobs.test_exits import trained
from tests.support.tables import fast_first, fast_where

SMALL, COLOUR = (1, 8, 8), (3, 32, 32)


def zoo(name: str, width: float = 0.25) -> nn.Module:
    return randomise(normalise(build(name, 10, width=width)))


def self_distilled() -> nn.Module:
    """A narrow network with the attention exits of self-distillation."""
    return randomise(add_aligned_exits(zoo("resnet10"), ("layer1.0.relu2", "layer2.0.relu2"), 10, COLOUR))


def several_exits() -> nn.Module:
    return randomise(add_exits(zoo("resnet18"), ("layer1.1.relu2", "layer3.1.relu2"), 10, COLOUR))


NETWORKS = {
    "resnet18": lambda: (zoo("resnet18"), COLOUR),
    "vgg16": lambda: (zoo("vgg16"), COLOUR),
    "mobilenetv2": lambda: (zoo("mobilenetv2"), COLOUR),
    "self-distilled": lambda: (self_distilled(), COLOUR),
    "plain exits": lambda: (several_exits(), COLOUR),
    "user's": lambda: (randomise(Residual()), SMALL),
}


def logits(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = model.eval()(x)
    return list(y) if isinstance(y, tuple) else [y]


@pytest.mark.parametrize("name", fast_where(lambda name: name in ("resnet18", "user's"), NETWORKS))
def test_it_is_torch_prunings_own_network(name: str) -> None:
    package = pytest.importorskip("torch_pruning")
    model, shape = NETWORKS[name]()
    cut = cut_channels(model, shape, 0.5)
    theirs = normalise(model).eval()
    classes = 4 if name == "user's" else 10
    last = [m for m in theirs.modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    pruner = package.pruner.BasePruner(
        theirs,
        (torch.zeros(1, *shape),),
        importance=package.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=last,
    )
    pruner.step()
    assert {k: v.shape for k, v in cut.network.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    x = torch.randn(2, *shape)
    for a, b in zip(logits(cut.network, x), logits(theirs, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert cut.whole == ()


@pytest.mark.parametrize("name", fast_first(["user's", "resnet18", "mobilenetv2", "self-distilled"]))
def test_more_is_cut_by_larger_amounts(name: str) -> None:
    model, shape = NETWORKS[name]()
    found = [count(model, shape)]
    for amount in (0.25, 0.5, 0.75):
        found.append(count(cut_channels(model, shape, amount).network, shape))
    for figure in ("macs", "params", "relus"):
        values = [getattr(total, figure) for total in found]
        assert values == sorted(set(values), reverse=True), figure
    assert all(len(total.unknown) == len(found[0].unknown) for total in found)


def test_of_each_layer_one_channel_stays_and_the_logits_all() -> None:
    model = zoo("resnet10")
    cut = cut_channels(model, COLOUR, 0.999)
    assert {len(one.indices) for one in cut.kept.values()} == {1}
    assert "fc" not in cut.kept
    assert logits(cut.network, torch.randn(2, *COLOUR))[0].shape == (2, 10)
    with pytest.raises(ShoalError, match="no channels that can be cut"):
        cut_channels(cut.network, COLOUR, 0.5)


class FromInput(nn.Module):
    """The images come back in a sum, so that the layer beside them has to keep their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.fc = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x + self.b(torch.relu(self.a(x)))).mean((2, 3)))


def test_layers_that_are_read_by_place_stay_whole() -> None:
    cut = cut_channels(zoo("resnet20", 0.5), COLOUR, 0.5)
    assert set(cut.kept) == {f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in (0, 1, 2)}
    assert {"conv1", "layer1.0.conv2"} <= set(cut.whole)
    cut = cut_channels(FromInput(), COLOUR, 0.5)
    assert (set(cut.kept), cut.whole) == ({"a"}, ("b",))


@pytest.mark.slow
def test_groups_of_channels_keep_equal_parts() -> None:
    model = zoo("resnext50-4")
    cut = cut_channels(model, COLOUR, 0.5)
    assert count(cut.network, COLOUR).macs < 0.5 * count(model, COLOUR).macs


@pytest.mark.parametrize(
    ("make", "shape", "pattern"),
    [
        (lambda: zoo("shufflenetv2"), COLOUR, "at chunk, which reads the outputs of stages"),
        (lambda: zoo("resnest50"), COLOUR, "at chunk, which reads the outputs of layer1"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), SMALL, "no channels that can be cut"),
    ],
)
def test_refused_by_layer(make: object, shape: tuple[int, ...], pattern: str) -> None:
    with pytest.raises(ShoalError, match=pattern):
        cut_channels(make(), shape, 0.5)  # type: ignore[operator]


def test_amounts_outside_are_refused() -> None:
    for amount in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ShoalError, match="need a fraction between 0 and 1"):
            cut_channels(Residual(), SMALL, amount)


class Mixing(nn.Module):
    """Channels change places without a change of their number, which no shape betrays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(torch.flip(self.a(x), (1,))).mean((2, 3)))


def test_channels_that_change_places_unseen_are_found_by_computing() -> None:
    with pytest.raises(ShoalError, match="b mixes channels"):
        cut_channels(Mixing(), SMALL, 0.5)


def test_a_network_cut_twice_comes_back() -> None:
    spec = Spec("resnet10", 10, COLOUR, 0.25)
    model = randomise(assemble(spec))
    for amount in (0.25, 0.5):
        cut = cut_channels(model, COLOUR, amount)
        spec, model = pruned_spec(spec, cut.kept), cut.network
    again = assemble(spec)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, *COLOUR)
    assert torch.equal(logits(again, x)[0], logits(model, x)[0])


@pytest.fixture(scope="module")
def multi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network has three exits."""
    return trained(tmp_path_factory.mktemp("multi") / "run")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, multi: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ShoalError, match=r"pip install shoal\[prune\]"):
        call("prune", str(multi), "--method", "channels", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def pruned(source: Path, out: Path, *more: str) -> dict[str, object]:
    words = ("prune", str(source), "--method", "channels", "--amount", "0.3,0.6", "--epochs", "1", "--rate", "0.05")
    return json.loads(call(*words, "--out", str(out), "--json", *more))


@pytest.mark.slow
def test_the_command_its_resume_and_its_runs(multi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = multi, tmp_path / "pruned"
    with pytest.raises(ShoalError, match="time is up"):
        pruned(source, out, "--max-seconds", "0")
    body, whole = pruned(source, out, "--resume"), pruned(source, tmp_path / "whole")
    assert body["rows"] == whole["rows"]
    assert body["torch_pruning"]
    rows = body["rows"]
    for figure in ("weights", "macs", "params", "relus"):
        assert rows[0][figure] > rows[1][figure] > rows[2][figure]
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # what was cut is loaded without it
    for row in rows[1:]:
        name = f"amount-{row['amount']:g}"
        spec, network = load_network(Run(out / name))
        total = count(network, spec.shape)
        assert (total.macs, total.params, total.relus) == (row["macs"], row["params"], row["relus"])
        assert len(cascade(network, spec.shape)) == len(row["accuracy"]) == len(row["exit_macs"]) == 3
        for k, v in load_network(Run(tmp_path / "whole" / name))[1].state_dict().items():
            assert torch.equal(v, network.state_dict()[k]), k
        assert json.loads(call("evaluate", str(out / name), "--json"))["accuracy"] == row["accuracy"][-1]
    assert (out / "pruning.png").read_bytes()[:4] == b"\x89PNG"
    reported = json.loads(call("report", str(out / "amount-0.3"), str(out / "amount-0.6"), "--json"))
    assert [row["reduced.macs"] for row in reported] == [row["macs"] for row in rows[1:]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain network's run, pruned by 0.3 and 0.6."""
    folder = tmp_path_factory.mktemp("channels")
    small = ("--data", "digits", "--width", "0.25", "--limit", "600")
    call("train", "resnet10", *small, "--epochs", "3", "--out", str(folder / "teacher"), "--json")
    pruned(folder / "teacher", folder / "pruned")
    return folder / "pruned" / "amount-0.3"


@pytest.mark.slow
def test_private_inference_computes_what_the_pruned_network_does(teacher: Path) -> None:
    body = json.loads(call("evaluate", str(teacher), "--fixed", "--json"))
    assert body["argmax_equal"] >= 0.99 * body["images"]
    assert body["max_abs_logit_error"] <= body["error_bound"]
    call("compile", str(teacher), "--out", str(teacher.parent / "artifact"))
    assert (teacher.parent / "artifact" / "client").is_dir()


@pytest.mark.slow
def test_the_pruned_network_is_a_base_to_reduce_and_to_prune(teacher: Path, tmp_path: Path) -> None:
    spec, network = load_network(Run(teacher))
    relus = count(network, spec.shape).relus
    budget = ("--budget", str(relus // 3), "--d-th", "0.12", "--epochs", "1,1,3")
    summary = json.loads(call("reduce", str(teacher), *budget, "--out", str(tmp_path / "reduced"), "--json"))
    assert summary["baseline"]["relus"] == relus
    assert summary["reduced"]["relus"] <= relus // 3
    spec, reduced = load_network(Run(tmp_path / "reduced"))
    assert spec.base_channels == load_network(Run(teacher))[0].base_channels
    # And cut once more, masks and all.
    rows = pruned(tmp_path / "reduced", tmp_path / "again")["rows"]
    spec, last = load_network(Run(tmp_path / "again" / "amount-0.6"))
    assert spec.kept_channels
    assert count(last, spec.shape).macs == rows[2]["macs"] < count(reduced, spec.shape).macs
    with pytest.raises(ShoalError, match="reduced already"):
        call("reduce", str(tmp_path / "again" / "amount-0.6"), *budget, "--out", str(tmp_path / "no"))


@pytest.mark.slow
def test_other_networks_weights_are_refused(teacher: Path, tmp_path: Path) -> None:
    run, body = Run(tmp_path), Run(teacher).read_json("model.json")
    (tmp_path / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes())
    name, _, of = body["base_channels"][0].partition("=")
    run.write_json("model.json", body | {"base_channels": [f"{name}=0/{of.partition('/')[2]}"]})
    with pytest.raises(ShoalError, match="found"):
        load_network(run)


def test_sites_keep_their_names() -> None:
    model = zoo("resnet10")
    cut = cut_channels(model, COLOUR, 0.5)
    assert [s.name for s in relu_sites(cut.network, COLOUR)] == [s.name for s in relu_sites(model, COLOUR)]
    again = keep_channels(model, COLOUR, cut.kept)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in cut.network.state_dict().items())
