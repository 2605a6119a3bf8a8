"""What all jobs that train have in common: one process where it must be, presets by name, nothing written too early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from shoal.cli.app import app
from shoal.errors import ShoalError
from shoal.jobs import distill, inplace, self_distill, train
from shoal.jobs.inputs import epochs_of, preset_of
from shoal.jobs.options import Shared
from shoal.jobs.training import prepare
from shoal.networks.spec import Spec
from shoal.recipes.inplace import Options as Exits
from shoal.recipes.stages import Stages
from shoal.storage.origins import Config, difference
from shoal.storage.run import Run
from shoal.training.schedule import Schedule, parse_schedule
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
    plain = self_distill.Request("resnet10", "digits")
    other = self_distill.Request("resnet10", "digits", replaced=("relu=relu6",))
    assert difference(plain.config(), other.config()) == "replaced"  # so that --resume refuses to change it


TRAINED = ("train", "distill", "inplace", "self-distill")


@pytest.mark.parametrize("option", ["--schedule", "--augment"])
def test_commands_that_train_new_networks_share_an_option_and_its_text(option: str) -> None:
    known = typer.main.get_command(app).commands
    found = [[p for p in known[name].params if option in p.opts] for name in TRAINED]
    assert [len(own) for own in found] == [1] * len(TRAINED)
    assert len({own[0].help for own in found}) == 1


REQUESTS = [
    (lambda **more: train.Request("resnet10", "digits", **more).config(), ("schedule", "augment")),
    (lambda **more: inplace.Request("resnet10", "digits", **more).config(Exits()), ("schedule", "augment")),
    (lambda **more: distill.Request("resnet10", "digits", **more).recorded(), ("schedule", "augment")),
    # Self-distillation records the augmentation with its recipe's options, as it did before.
    (lambda **more: self_distill.Request("resnet10", "digits", **more).config(), ("schedule",)),
]


@pytest.mark.parametrize(("config", "names"), REQUESTS)
def test_a_run_records_schedule_and_augmentation_only_if_they_were_given(
    config: Callable[..., Config], names: tuple[str, ...]
) -> None:
    given = {"schedule": "epochs=2,lr=0.5", "augment": "crop"}
    plain, other = config(), config(**given)
    assert not {"schedule", "augment"} & set(plain)  # so that runs of earlier versions can be resumed
    assert {name: other.get(name) for name in names} == {name: given[name] for name in names}
    assert difference(plain, other) in names  # so that --resume refuses to change them


def test_a_given_schedule_replaces_the_presets_and_epochs_scale_it() -> None:
    own = Schedule(10, 0.3, (5,), nesterov=True)
    assert train.Request("resnet10", "digits").scheduled(own) is own
    text = "epochs=40,milestones=20/30,batch_size=16"
    assert train.Request("resnet10", "digits", schedule=text).scheduled(own) == parse_schedule(text)
    short = train.Request("resnet10", "digits", schedule=text, epochs=4).scheduled(own)
    assert short == Schedule(4, milestones=(2, 3), batch_size=16)
    assert self_distill.Request("resnet10", "digits", schedule=text).schedules().schedule == parse_schedule(text)
    assert inplace.Request("resnet10", "digits", schedule=text).schedules(Exits()).schedule == parse_schedule(text)


def test_an_augmentation_reaches_training_and_must_suit_the_data(tmp_path: Path) -> None:
    job = prepare(CONFIG | {"augment": "crop"}, None, Shared(tmp_path / "out")).begin()
    assert job.settings.augment == "crop"
    for policy in ("mixup", "scale-shift"):
        with pytest.raises(ShoalError, match=f"found '{policy}' at augment for images; need one of none, crop"):
            prepare(CONFIG | {"augment": policy}, None, Shared(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_all_commands_train_under_one_setting_which_resume_cannot_change(tmp_path: Path) -> None:
    """Each stage of each command has the schedule's two epochs, whatever its preset has."""
    data = ("--data", "digits", "--width", "0.125", "--limit", "64")
    setting = ("--schedule", "epochs=2,lr=0.05,batch_size=32", "--augment", "crop")
    words = {
        "train": ("train", "resnet10", *data),
        "distill": ("distill", "osakd", "resnet10", *data),
        "inplace": ("inplace", "resnet10", *data, "--exit", "relu"),
        "self-distill": ("self-distill", "resnet10", *data, "--kind", "aligned", "--after", "relu"),
    }
    for name, line in words.items():
        out = ("--out", str(tmp_path / name))
        call(*line, *setting, *out)
        rows = Run(tmp_path / name).metrics()
        stages = {row["stage"] for row in rows}
        assert sorted((row["stage"], row["epoch"]) for row in rows) == [(s, e) for s in sorted(stages) for e in (0, 1)]
        call(*line, *setting, *out, "--resume")
        with pytest.raises(ShoalError, match="schedule"):
            call(*line, "--schedule", "epochs=2", "--augment", "crop", *out, "--resume")


def test_a_spec_is_that_of_the_data() -> None:
    request = train.Request("resnet10", "digits", width=0.25)
    assert request.spec(blobs(8)) == Spec("resnet10", blobs(8).classes, blobs(8).shape, 0.25)
