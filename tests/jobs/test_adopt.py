"""`shoal adopt`: a run of a network that was trained elsewhere, and what other commands make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.data.loading import load
from shoal.data.normalisation import normalised
from shoal.errors import ShoalError, ShoalWarning
from shoal.models import build
from shoal.networks.spec import Spec
from shoal.private.program.program import Program
from shoal.recipes.stages import Stages, train_teacher
from shoal.storage.run import Run
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.cli.test_commands import call

MEAN, STD = 0.1, 0.5
WORDS = ("--data", "digits", "--width", "0.125", "--limit", "300")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A network that was trained with a normalisation of its own, saved as DataParallel does; and its accuracy."""
    torch.set_num_threads(1)
    data = normalised(load("digits", limit=300), (MEAN,), (STD,))
    spec, settings = Spec("resnet10", 10, data.shape, 0.125), Settings()
    network, _ = train_teacher(
        spec,
        Schedule(4, 0.1, (3,), batch_size=32),
        Stages(data, settings),
        base=build("resnet10", 10, channels=1, width=0.125),
    )
    path = tmp_path_factory.mktemp("elsewhere") / "net.pth.tar"
    accuracy = evaluated(network, data)
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": accuracy}, path)
    return path, accuracy


def evaluated(network: Any, data: Any) -> float:
    from shoal.training.evaluation import evaluate

    return evaluate(network, data, data.test, Settings())[-1]


@pytest.fixture(scope="module")
def adopted(checkpoint: tuple[Path, float], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "adopted"
    words = ("--weights", str(checkpoint[0]), "--mean", str(MEAN), "--std", str(STD), "--out", str(out), "--json")
    return out, json.loads(call("adopt", "resnet10", *WORDS, *words))


def test_it_has_the_accuracy_that_the_file_states(
    adopted: tuple[Path, dict[str, Any]], checkpoint: tuple[Path, float]
) -> None:
    out, body = adopted
    assert body["accuracy"] == body["claimed"] == checkpoint[1] > 50
    assert body["adapted"] == "removed the prefix 'module.' of every name"
    config = Run(out).config()
    assert (config["command"], config["mean"], config["std"]) == ("adopt", [MEAN], [STD])
    assert json.loads(call("evaluate", str(out), "--json"))["accuracy"] == checkpoint[1]


def test_what_comes_from_it_keeps_its_normalisation(adopted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = adopted
    reduced = tmp_path / "reduced"
    call(
        "reduce",
        str(out),
        "--budget",
        "400",
        "--no-gates",
        "--no-exit",
        "--epochs",
        "1,2,1",
        "--out",
        str(reduced),
        "--json",
    )
    config = Run(reduced).config()
    assert (config["mean"], config["std"]) == ([MEAN], [STD])
    call("compile", str(reduced), "--out", str(tmp_path / "artifact"), "--json")
    preprocessing = Program.load(tmp_path / "artifact" / "client").preprocessing
    assert (preprocessing["mean"], preprocessing["std"]) == ([MEAN], [STD])
    assert preprocessing["class_names"] == list("0123456789")


def test_other_commands_take_it(adopted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, body = adopted
    assert json.loads(call("cost", str(out), "--json"))["relus"] == body["relus"]
    call("plan", str(out), "--target", "2krelus", "--json")
    call(
        "distill",
        "kd",
        "resnet10",
        "--width",
        "0.125",
        "--teacher",
        str(out),
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "kd"),
    )
    call("prune", str(out), "--amount", "0.3", "--epochs", "1", "--out", str(tmp_path / "pruned"))
    for run in (tmp_path / "kd", tmp_path / "pruned"):
        assert Run(run).config()["mean"] == [MEAN]


def test_a_wrong_normalisation_is_noticed(checkpoint: tuple[Path, float], tmp_path: Path) -> None:
    path, accuracy = checkpoint
    words = ("--weights", str(path), "--mean", "0.9", "--std", "0.05", "--out", str(tmp_path / "run"), "--json")
    with pytest.warns(ShoalWarning, match=rf"where its file states {accuracy:.2f} %; need the images as in training"):
        call("adopt", "resnet10", *WORDS, *words)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--normalise", "inception"), "found normalisation 'inception'"),
        (("--mean", "0.5"), "need a name, or both"),
        (("--mean", "0.5,0.5", "--std", "1,1"), "for images of 1 channels"),
        (("--classes", "12"), "3 of another shape|of another shape: fc.weight"),
        (("--weights", "missing.pth"), "found no readable weights at missing.pth"),
    ],
)
def test_errors_come_before_anything_is_written(
    words: tuple[str, ...], text: str, checkpoint: tuple[Path, float], tmp_path: Path
) -> None:
    given = words if "--weights" in words else ("--weights", str(checkpoint[0]), *words)
    with pytest.raises(ShoalError, match=text):
        call("adopt", "resnet10", *WORDS, *given, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
