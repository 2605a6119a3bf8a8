"""A folder with finished runs, and a call of the command line that must fail."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shoal.cli.app import main
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.networks.stored import save_network
from shoal.storage.run import Run

OWN = """
import torch
from torch import nn

def plain():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10),
    )

def greedy(depth):
    return plain()

def narrow():
    return nn.Sequential(plain(), nn.Linear(10, 3))

class Twisted(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def number():
    return 3
"""
"""The user's own module, in the current folder."""

Fails = Callable[..., str]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fails:
    """Runs the command line in this process; it must end as users are promised. Returns the sentence."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["shoal", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        assert (ended.value.code, len(lines)) == (1, 1), lines
        assert lines[0].startswith("shoal: found ")
        return lines[0]

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's module, the runs `teacher`, `plain` and `reduced`, and a file `afile`."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "own.py").write_text(OWN)
    (folder / "afile").write_text("mine")
    scope: dict[str, Any] = {}
    exec(OWN, scope)
    finished(folder / "teacher", Spec("resnet10", 10, (1, 16, 16), 0.125))
    finished(folder / "plain", Spec("own:plain", 10, (1, 16, 16)), scope["plain"]())
    finished(folder / "reduced", Spec("resnet10", 10, (1, 16, 16), 0.125, masked=("layer1.0.relu1",)))
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of what is made, as the current folder."""
    folder = Path(shutil.copytree(made, tmp_path / "here"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    sys.modules.pop("own", None)


def finished(folder: Path, spec: Spec, base: nn.Module | None = None) -> None:
    """An untrained network's run with all the files that a reduction leaves."""
    run = Run.create(folder, {"command": "train", "data": "digits", "seed": 0, "limit": 200})
    save_network(run, spec, assemble(spec, base))
    run.log("teacher", {"epoch": 0, "accuracy": 10.0})
    figures = {"accuracy": 10.0, "relus": 100, "macs": 1000}
    summary = {"data": "digits", "model": spec.base, "seed": 0, "baseline": figures, "reduced": figures}
    run.write_json("summary.json", summary)
