"""A user's own module is found from any folder, however it was named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from shoal.errors import ShoalError
from shoal.networks.assembly import located
from shoal.networks.spec import Spec
from tests.cli.test_commands import call

NETWORK = """
from torch import nn

def net(classes=10):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, classes))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "own_net.py").write_text(NETWORK)
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "own_net", raising=False)
    return folder


def test_names_and_their_folders(home: Path) -> None:
    assert located("resnet18") == ("resnet18", "")
    assert located("own_net:net") == ("own_net:net", str(home))
    assert located("own_net.py:net") == ("own_net:net", str(home))
    assert located(str(home / "own_net.py") + ":net") == ("own_net:net", str(home))
    assert located("torch.nn:Linear") == ("torch.nn:Linear", "")
    assert located(":x") == (":x", "")
    for bare in ("own_net", "own_net.py"):
        with pytest.raises(ShoalError, match=f"found '{bare}', a file without the name of a network; need {bare}:NAME"):
            located(bare)


@pytest.mark.parametrize("name", ["own_net:net", "own_net.py:net"])
def test_a_run_is_used_from_any_folder(name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("train", name, "--data", "digits", "--limit", "100", "--epochs", "1", "--out", "run", "--json")
    body = json.loads(call(*words))
    assert Spec.load(home / "run" / "model.json").folder == str(home)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_net", raising=False)
    again = json.loads(call("evaluate", str(home / "run"), "--json"))
    assert again["accuracy"] == body["accuracy"]


def test_a_module_that_moved_is_found_in_the_current_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("train", "own_net:net", "--data", "digits", "--limit", "100", "--epochs", "1", "--out", str(tmp_path / "run"))
    moved = tmp_path / "moved"
    home.rename(moved)
    monkeypatch.chdir(moved)
    monkeypatch.delitem(sys.modules, "own_net", raising=False)
    call("evaluate", str(tmp_path / "run"))
