"""What all jobs that train have in common: one process where it must be, presets by name, nothing written too early."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import ShoalError
from shoal.jobs.inputs import epochs_of, preset_of
from shoal.jobs.options import Shared
from shoal.jobs.training import prepare
from shoal.networks.spec import Spec
from shoal.recipes.stages import Stages
from shoal.storage.origins import difference
from shoal.storage.run import Run
from shoal.training.settings import Settings
from tests.cli.test_commands import call
from tests.support.fits import blobs

CONFIG = {"command": "train", "data": "digits", "data_dir": None, "seed": 3, "limit": 64}
SMALL = ("--data", "digits", "--width", "0.125", "--limit", "64", "--epochs", "1")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reduce", ("nowhere", "--budget", "10")),
        ("reduce", ("nowhere", "--recipe", "deepreduce")),
        ("self-distill", ("resnet10", *SMALL)),
        ("inplace", ("resnet10", *SMALL, "--exit", "relu")),
        ("distill", ("osakd", "resnet10", *SMALL)),
        ("prune", ("nowhere",)),
    ],
)
def test_torchrun_is_refused(
    name: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ShoalError, match=f"found {name} under torchrun; need one process"):
        call(name, *words, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unknown_preset_is_refused_with_all_names() -> None:
    assert preset_of("b", {"a": 1, "b": 2}) == 2
    with pytest.raises(ShoalError, match="found preset 'c'; need one of a, b; choose one"):
        preset_of("c", {"a": 1, "b": 2})


@pytest.mark.parametrize("text", ["1", "1,2,3", "1,x", ""])
def test_epochs_are_a_number_for_each_stage(text: str) -> None:
    assert epochs_of("1, 2", ("mask", "finetune")) == (1, 2)
    with pytest.raises(ShoalError, match="need 2 numbers: mask,finetune"):
        epochs_of(text, ("mask", "finetune"))


def test_a_job_writes_nothing_before_it_begins(tmp_path: Path) -> None:
    prepared = prepare(CONFIG, None, Shared(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    job = prepared.fingerprinted().begin()
    body = job.run.read_json("config.json")
    assert {name: body[name] for name in CONFIG} == CONFIG
    assert set(body["fingerprints"]) == {"data"}
    assert job.settings.seed == 3


def test_a_seed_without_a_meaning_is_refused_before_data_are_read(tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match="found seed -1"):
        prepare(CONFIG | {"data": "nowhere", "seed": -1}, None, Shared(tmp_path / "out"))


def test_stages_with_other_settings_share_the_clock(tmp_path: Path) -> None:
    stages = Stages(blobs(8), Settings(seed=5), Run(tmp_path))
    other = stages.changed(select="train")
    assert (other.settings.seed, other.settings.select, stages.settings.select) == (5, "train", "val")
    assert other.clock is stages.clock
    assert other.folder.folder == tmp_path
    with pytest.raises(ShoalError, match="found no run folder"):
        _ = Stages(blobs(8), Settings()).folder


def test_a_run_records_which_layers_self_distillation_replaced() -> None:
    from shoal.jobs.self_distill import Request

    plain, other = Request("resnet10", "digits"), Request("resnet10", "digits", replaced=("relu=relu6",))
    assert difference(plain.config(), other.config()) == "replaced"  # so that --resume refuses to change it


def test_a_spec_is_that_of_the_data() -> None:
    from shoal.jobs.train import Request

    request = Request("resnet10", "digits", width=0.25)
    assert request.spec(blobs(8)) == Spec("resnet10", blobs(8).classes, blobs(8).shape, 0.25)
