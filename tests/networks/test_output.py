"""The output of a user's network that has the logits is chosen by its number, and every later command knows it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from shoal.data.dataset import Dataset
from shoal.errors import ShoalError, ShoalWarning
from shoal.networks.adoption import adopt
from shoal.networks.assembly import assemble, own_network
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network, save_network
from shoal.storage.run import Run
from tests.cli.test_commands import call
from tests.conftest import blobs

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv, self.fc, self.side = nn.Conv2d(1, classes, 3, 2), nn.Linear(classes, classes), nn.Linear(classes, 3)

    def forward(self, x):
        features = torch.relu(self.conv(x)).mean((2, 3))
        return features, self.fc(features), [self.side(features)]

class Flat(Net):
    def forward(self, x):
        return super().forward(x)[:2]
"""
INPUT = ("--input", "1x16x16")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "side_net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "side_net", raising=False)
    return tmp_path


@pytest.mark.parametrize("words", [("count", *INPUT), ("check", *INPUT), ("cost", *INPUT)])
def test_every_command_asks_for_it_and_takes_it(words: tuple[str, ...], home: Path) -> None:
    command, *more = words
    with pytest.raises(ShoalError, match=r"output 1 is computed from the last layer of output 0 at Flat.*--output"):
        call(command, "side_net:Flat", *more)
    body = json.loads(call(command, "side_net:Net", *more, "--output", "1", "--json"))
    assert body["relus"] == 10 * 49
    assert body["params"] == 10 * 9 + 10 + 110  # neither the side classifier's
    with pytest.raises(ShoalError, match="found 3 outputs of forward at Net and output 3; need the number of one"):
        call(command, "side_net:Net", *more, "--output", "3")


def test_a_run_of_a_checkpoint_keeps_it(home: Path) -> None:
    torch.manual_seed(0)
    network = own_network(Spec("side_net:Net", 10, (1, 16, 16), folder=str(home)))
    torch.save(network.state_dict(), home / "net.pt")  # with the weights of the side classifier
    words = ("--data", "digits", "--limit", "100", "--weights", str(home / "net.pt"), "--out", str(home / "run"))
    with pytest.raises(ShoalError, match=r"found that forward returns a list at Net; .*by --output"):
        call("adopt", "side_net:Net", *words)
    with pytest.warns(ShoalWarning, match="where guessing gives"):  # the weights are random
        call("adopt", "side_net:Net", *words, "--output", "1")
    run = Run(home / "run")
    assert run.config()["output"] == 1
    spec, adopted = load_network(run)
    assert spec.output == 1
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(adopted(x), network.eval()(x)[1])
    assert "accuracy" in json.loads(call("evaluate", str(run.folder), "--json"))


def test_training_records_it(home: Path) -> None:
    words = ("--data", "digits", "--limit", "40", "--epochs", "1", "--out", str(home / "run"), "--output", "1")
    call("train", "side_net:Net", *words)
    assert Run(home / "run").config()["output"] == Spec.load(home / "run" / "model.json").output == 1
    with pytest.raises(ShoalError, match=r"found --output with the run .*; need what that run has"):
        call("self-distill", str(home / "run"), "--output", "1", "--out", str(home / "other"))


def test_a_module_in_memory_is_adopted_and_loaded_with_it(home: Path) -> None:
    network = own_network(Spec("side_net:Net", 4, (1, 8, 8), folder=str(home))).eval()
    data: Dataset = blobs(32)
    spec, adopted = adopt(network, data, output=1)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(adopted(x), network(x)[1])
    run = Run.create(home / "run", {})
    save_network(run, spec, adopted)
    for base in (network, adopted):
        again, loaded = load_network(run, base=base)
        assert again == spec
        assert torch.equal(loaded(x), network(x)[1])
    with pytest.raises(ShoalError, match="found 3 outputs of forward at Net and output 7"):
        assemble(Spec("given", 4, (1, 8, 8), output=7), network)


@pytest.mark.parametrize("output", [-1, "1", True, 0.5])
def test_a_damaged_number_is_refused(output: object, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    Spec("resnet10", 10, (3, 8, 8)).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"output": output}))
    with pytest.raises(ShoalError, match="found a bad 'output'"):
        Spec.load(path)


def test_an_onnx_file_has_one(tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=r"found --output 1 with net.onnx; need none"):
        call("adopt", "net.onnx", "--data", "digits", "--output", "1", "--out", str(tmp_path / "run"))
