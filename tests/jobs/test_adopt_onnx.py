"""`shoal adopt` of an ONNX file: the run is complete in itself, and other commands take it."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime", reason="needs the onnx extra")

from shoal.data.loading import load
from shoal.errors import ShoalError
from shoal.jobs import adopt as job
from shoal.networks.assembly import base_model, located
from shoal.networks.onnx_files import open_file
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network, save_network
from shoal.private.program.program import Program
from shoal.recipes.stages import Stages, train_teacher
from shoal.storage.run import Run
from shoal.training.evaluation import evaluate
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.cli.test_commands import call
from tests.conftest import Residual

WORDS = ("--data", "digits", "--limit", "300", "--json")


class Probabilities(nn.Module):
    """A network that ends with a softmax, as Keras' networks do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.network(x), 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A trained network that PyTorch has written for one image at a time; and its test accuracy."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, path = load("digits", limit=300), tmp_path_factory.mktemp("elsewhere") / "net.onnx"
    schedule = Schedule(4, 0.1, (3,), batch_size=32)
    network, _ = train_teacher(Spec("given", 10, data.shape), schedule, Stages(data, Settings()), base=Residual(10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Probabilities(network).eval(), (torch.zeros(1, 1, 16, 16),), str(path), dynamo=False)
    return path, evaluate(network, data, data.test, Settings())[-1]


@pytest.fixture(scope="module")
def net(trained: tuple[Path, float]) -> Path:
    return trained[0]


@pytest.fixture(scope="module")
def adopted(net: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "adopted"
    return out, json.loads(call("adopt", str(net), *WORDS, "--out", str(out)))


def test_it_tells_the_accuracy_and_the_difference_from_onnxruntime(
    adopted: tuple[Path, dict[str, Any]], trained: tuple[Path, float]
) -> None:
    _, body = adopted
    assert body["accuracy"] == trained[1] > 15
    assert 0 < body["onnx_difference"] < 1e-4
    assert body["adapted"].startswith("removed Softmax at the end (")
    assert body["claimed"] is None
    assert body["relus"] == 3 * 4 * 256 + 2 * 8 * 64


def test_the_run_has_the_file_and_its_digest_and_works_anywhere(
    net: Path, adopted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, body = adopted
    kept = list(out.glob("network-*.onnx"))
    assert [path.read_bytes() for path in kept] == [net.read_bytes()]
    shutil.copytree(out, tmp_path / "moved")
    spec, network = load_network(Run(tmp_path / "moved"))
    assert (spec.base, spec.folder) == ("net.onnx", str(tmp_path / "moved"))
    assert spec.digest.startswith(kept[0].stem.removeprefix("network-"))
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(network(images), load_network(Run(out))[1](images))
    save_network(Run(tmp_path / "other"), spec, network)  # a run that starts from it
    shutil.rmtree(tmp_path / "moved")
    assert torch.equal(load_network(Run(tmp_path / "other"))[1](images), load_network(Run(out))[1](images))
    assert json.loads(call("evaluate", str(out), "--json"))["accuracy"] == body["accuracy"]


def test_a_changed_or_missing_file_is_noticed(adopted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(adopted[0], tmp_path / "run")
    path = next((tmp_path / "run").glob("network-*.onnx"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShoalError, match=rf"found another file at {path} than the network was made from; need"):
        load_network(Run(tmp_path / "run"))
    path.unlink()
    facts = json.loads((tmp_path / "run" / "model.json").read_text())
    (tmp_path / "run" / "model.json").write_text(json.dumps(facts | {"folder": str(tmp_path)}))
    with pytest.raises(ShoalError, match=r"found no .*network-.*onnx; need the ONNX file that the network was made"):
        load_network(Run(tmp_path / "run"))
    (tmp_path / "run" / "model.json").write_text(json.dumps(facts | {"digest": "../up"}))
    with pytest.raises(ShoalError, match="found a bad 'digest'"):
        load_network(Run(tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--weights", "net.pth"), "found --weights net.pth beside .*net.onnx; need one of them"),
        (("--width", "0.5"), "found --width or --resolution with .*net.onnx; need neither"),
        (("--classes", "12"), "found a result of shape .10,. for an image from 'net.onnx'; need 12 logits"),
        (("--data", "cifar10", "--data-dir", "nowhere"), "nowhere"),
    ],
)
def test_errors_come_before_anything_is_written(words: tuple[str, ...], text: str, net: Path, tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=text):
        call("adopt", str(net), *WORDS, *words, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_other_networks_need_weights(tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match="found no weights for resnet10; need them, unless the network is an ONNX"):
        call("adopt", "resnet10", *WORDS, "--out", str(tmp_path / "run"))


def test_other_commands_say_how_to_use_an_onnx_file(net: Path) -> None:
    with pytest.raises(ShoalError, match=r"found an ONNX file, .*net.onnx'; need a run .* with shoal adopt"):
        located(str(net))


def test_an_onnx_file_has_one_size(net: Path) -> None:
    spec, _ = open_file(net, load("digits", limit=300), None)
    with pytest.raises(ShoalError, match=r"found width 0.5 and resolution 1 for net.onnx; need 1 and 1"):
        base_model(replace(spec, width=0.5))


def test_a_difference_is_refused(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.conversion.parity.TOLERANCE", 0.0)
    with pytest.raises(ShoalError, match=r"found logits that differ by .* from onnxruntime's"):
        job.adopt(job.Request(str(net), "digits", tmp_path / "run", limit=300))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_it_is_reduced_and_compiled(adopted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, reduced = adopted[0], tmp_path / "reduced"
    words = ("--budget", "400", "--no-gates", "--no-exit", "--epochs", "1,1,1", "--out", str(reduced), "--json")
    assert json.loads(call("reduce", str(out), *words))["reduced"]["relus"] <= 400
    call("compile", str(reduced), "--out", str(tmp_path / "artifact"), "--json")
    assert Program.load(tmp_path / "artifact" / "client").preprocessing["class_names"] == list("0123456789")
    assert len(list(reduced.glob("network-*.onnx"))) == 1
