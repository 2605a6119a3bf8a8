"""Fine-tuning on masks that another reduction found: the same bits as searching for them again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from shoal.errors import ShoalError
from shoal.networks.stored import load_network
from shoal.storage.checkpoint import Checkpoint
from shoal.storage.run import Run
from shoal.storage.tensors import load_weights
from tests.cli.test_commands import call
from tests.support.fits import same

TRAIN = ("train", "resnet10", "--data", "digits", "--width", "0.125", "--limit", "200", "--epochs", "1")
PLAIN = ("--budget", "900", "--epochs", "1,2,3", "--no-gates", "--no-exit")
GATED = ("--budget", "900", "--epochs", "1,2,4", "--d-th", "0.9")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a plain reduction, and a gated one that found its own masks."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("masks")
    call(*TRAIN, "--out", root / "teacher")
    call("reduce", root / "teacher", *PLAIN, "--out", root / "plain")
    call("reduce", root / "teacher", *GATED, "--out", root / "gated")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("shards", [(), pytest.param(("--shard-mb", "0.1"), marks=pytest.mark.slow)])
def test_taken_masks_are_fine_tuned_to_the_same_bits(made: Path, tmp_path: Path, shards: tuple[str, ...]) -> None:
    call("reduce", made / "teacher", *GATED, "--masks-from", made / "plain", *shards, "--out", tmp_path / "own")
    found, expected = (load_network(Run(folder))[1].state_dict() for folder in (tmp_path / "own", made / "gated"))
    assert same(found, expected)
    stages = {row["stage"] for row in Run(tmp_path / "own").metrics()}
    assert stages == {"finetune"}
    assert Run(tmp_path / "own").read_json("summary.json")["reduced"]["replaced_blocks"]


@pytest.mark.slow
def test_what_was_taken_is_the_runs_own(made: Path, tmp_path: Path) -> None:
    """The other run may go; a resumed one goes on with its copy."""
    shutil.copytree(made / "plain", tmp_path / "plain")
    words = ("reduce", made / "teacher", *GATED, "--masks-from", tmp_path / "plain", "--out", tmp_path / "own")
    with pytest.raises(ShoalError, match="time is up"):
        call(*words, "--max-seconds", "0")
    shutil.rmtree(tmp_path / "plain")
    call(*words, "--resume")
    found, expected = (load_network(Run(folder))[1].state_dict() for folder in (tmp_path / "own", made / "gated"))
    assert same(found, expected)


REFUSED = [
    (("--budget", "800", "--epochs", "1,2,4"), "found another budget"),
    (("--budget", "900", "--epochs", "1,3,4"), "found another epochs"),
    (("--budget", "900", "--epochs", "1,2,4", "--masks", "snl"), "found another masks"),
    (("--budget", "900", "--epochs", "1,2,4", "--granularity", "channel"), "found another granularity"),
    (("--budget", "900", "--epochs", "1,2,4", "--precision", "bf16"), "found another precision"),
    (("--recipe", "deepreduce", "--budget", "900"), "found masks_from .* with recipe deepreduce"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_masks_of_another_search_are_refused(made: Path, tmp_path: Path, options: tuple[str, ...], text: str) -> None:
    with pytest.raises(ShoalError, match=text):
        call("reduce", made / "teacher", *options, "--masks-from", made / "plain", "--out", tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.slow
def test_masks_of_another_teacher_and_of_an_unfinished_search_are_refused(made: Path, tmp_path: Path) -> None:
    call(*TRAIN, "--seed", "1", "--out", tmp_path / "other")
    with pytest.raises(ShoalError, match="found another seed"):
        call("reduce", tmp_path / "other", *GATED, "--masks-from", made / "plain", "--out", tmp_path / "own")
    with pytest.raises(ShoalError, match="time is up"):
        call("reduce", made / "teacher", *PLAIN, "--out", tmp_path / "begun", "--max-seconds", "0")
    with pytest.raises(ShoalError, match=r"found 0 of 2 epochs of the search of masks at .*begun; .* resume that run"):
        call("reduce", made / "teacher", *GATED, "--masks-from", tmp_path / "begun", "--out", tmp_path / "late")


def test_a_stage_that_has_begun_stays_as_it_is(made: Path, tmp_path: Path) -> None:
    earlier, own = Run(made / "plain").checkpoint("mask"), Checkpoint(tmp_path, "mask")
    own.take(earlier)
    before = own.last_path.read_bytes()
    own.take(Run(made / "gated").checkpoint("finetune"))
    assert own.last_path.read_bytes() == before
    assert same(load_weights(own.best_path), load_weights(earlier.best_path))
