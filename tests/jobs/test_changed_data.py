"""Data that changed since a run began are noticed by every command that uses the run."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from PIL import Image

from shoal.errors import ShoalError
from tests.cli.test_commands import call

COMMANDS = {
    "evaluate": ("evaluate", "RUN"),
    "reduce": ("reduce", "RUN", "--budget", "100", "--no-gates", "--no-exit", "--epochs", "1,2,1", "--out", "OUT"),
    "compile": ("compile", "RUN", "--out", "OUT"),
    "prune": ("prune", "RUN", "--out", "OUT"),
    "distill": ("distill", "kd", "resnet10", "--width", "0.125", "--teacher", "RUN", "--out", "OUT"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and beside it the folder of images that it was trained with."""
    home, rng = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (home / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / "images" / name / f"{i:02d}.png")
    words = ("--width", "0.125", "--epochs", "1", "--out", str(home / "run"))
    call("train", "resnet10", "--data", str(home / "images"), *words)
    return home


def add(images: Path) -> None:
    Image.new("RGB", (16, 16)).save(images / "cat" / "99.png")


def remove(images: Path) -> None:
    (images / "dog" / "07.png").unlink()


def add_class(images: Path) -> None:
    (images / "cow").mkdir()
    Image.new("RGB", (16, 16)).save(images / "cow" / "00.png")


@pytest.mark.parametrize("change", [add, remove, add_class])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_split_is_redrawn_in_silence(command: str, change: object, trained: Path, tmp_path: Path) -> None:
    images = copytree(trained / "images", tmp_path / "images")
    change(images)  # type: ignore[operator]
    words = [{"RUN": str(trained / "run"), "OUT": str(tmp_path / "out")}.get(w, w) for w in COMMANDS[command]]
    with pytest.raises(ShoalError, match=r"found other data at .*/images than the run began with.*splits depend"):
        call(*words, "--data-dir", str(images))
    assert not (tmp_path / "out").exists()


def test_the_same_images_elsewhere_are_the_same_data(trained: Path, tmp_path: Path) -> None:
    images = copytree(trained / "images", tmp_path / "images")
    here = json.loads(call("evaluate", str(trained / "run"), "--json"))
    assert json.loads(call("evaluate", str(trained / "run"), "--data-dir", str(images), "--json")) == here
    add(images)
    call("evaluate", str(trained / "run"), "--data-dir", str(images), "--other-data", "--json")
