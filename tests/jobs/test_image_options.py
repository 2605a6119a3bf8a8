"""--size, --fit and --channels: recorded when given, used by later runs, and applied to the images of a query."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from shoal.data.images import FITS
from shoal.data.mapped import MappedImages
from shoal.errors import ShoalError
from shoal.jobs import adopt, distill, inplace, self_distill, train
from shoal.jobs.inputs import load_data
from shoal.jobs.options import parse_size
from shoal.jobs.query import Compilation, compile_run, pixels_of
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.networks.stored import save_network
from shoal.private.program.program import Program
from shoal.recipes import deepreduce
from shoal.recipes import inplace as inplace_recipe
from shoal.recipes.deepreduce.training import Teaching, Trainer
from shoal.recipes.stages import Stages
from shoal.storage.origins import SIZING, Config, absolute, difference, inherited, updated
from shoal.storage.run import Run
from shoal.training.settings import Settings
from tests.cli.test_commands import call
from tests.support.fits import DATA
from tests.support.layouts import pixels

GIVEN: dict[str, Any] = {"size": "8x6", "fit": "pad", "channels": 1}
RECORDED = {"size": [8, 6], "fit": "pad", "channels": 1}
NET: dict[str, Any] = {"model": "resnet10", "data": "set"}


def configs(**options: Any) -> dict[str, Config]:
    """The configuration that each command records with these options."""
    student = distill.Request(**NET, **options)
    return {
        "train": train.Request(**NET, **options).config(),
        "adopt": adopt.Request(**NET, **options, weights=Path("w.pt"), out=Path("out")).config(),
        "self-distill": self_distill.Request(**NET, **options).config(),
        "inplace": inplace.Request(**NET, **options).config(inplace_recipe.Options()),
        "distill": student.recorded() | student.origin(),
    }


@pytest.mark.parametrize("command", configs())
def test_options_are_recorded_only_if_they_are_given(command: str) -> None:
    plain, given = configs()[command], configs(**GIVEN)[command]
    assert not plain.keys() & set(SIZING)
    assert given == plain | RECORDED
    assert configs(channels=1)[command] == plain | {"channels": 1}


@pytest.mark.parametrize("command", configs())
def test_the_folder_of_decoded_images_is_recorded_and_inherited_but_decides_nothing(command: str) -> None:
    plain, given = configs()[command], configs(cache=Path("decoded"))[command]
    assert given == plain | {"cache": Path("decoded")}
    assert difference(plain, given) is None
    assert inherited(given)["cache"] == Path("decoded")
    assert updated(plain, given) == given
    assert absolute(given)["cache"] == Path("decoded").absolute()


def test_a_run_reads_decoded_images_and_refuses_other_data(tmp_path: Path, images: Path) -> None:
    data = load_data({"data": "set", "seed": 0, "size": 8, "cache": tmp_path / "decoded"}, None)
    config = {"data": "set", "seed": 0, "size": 8, "fingerprints": {"data": data.fingerprint()}}
    cached = config | {"cache": tmp_path / "decoded"}
    for known in (config, cached):
        assert load_data(known, None).fingerprint() == data.fingerprint()
    assert isinstance(load_data(cached, None).train.images, MappedImages)
    picture = next(path for path in sorted((tmp_path / "set").rglob("*.png")))
    picture.unlink()
    with pytest.raises(ShoalError, match="found other image files at"):
        load_data(cached, None)
    shutil.rmtree(tmp_path / "decoded")
    for known in (config, cached):
        with pytest.raises(ShoalError, match="found other data at set than the run began with"):
            load_data(known, None)


@pytest.mark.parametrize(
    ("text", "size"), [("224", 224), ("224x160", [224, 160]), ("32X48", [32, 48]), ("32x32", 32), ("1", 1)]
)
def test_a_size_is_one_number_or_two(text: str, size: Any) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "0", "8x0", "8x", "8x8x3", "-8", "8.5", "big", "²"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ShoalError, match=r"found --size .*; need pixels such as 224, or height x width"):
        parse_size(text)


def test_later_runs_inherit_how_images_are_read() -> None:
    origin = {"data": "set", "seed": 3, "mean": [0.5], "std": [0.2], "epochs": 9} | RECORDED
    later = {"data": "set", "data_dir": None, "seed": 3, "limit": None, "mean": [0.5], "std": [0.2]} | RECORDED
    assert inherited(origin) == later
    assert inherited({"data": "set", "seed": 3}).keys() == {"data", "data_dir", "seed", "limit"}


def test_designs_of_deepreduce_inherit_how_images_are_read(tmp_path: Path) -> None:
    origin = {"data": "digits", "seed": 0, "mean": [0.5], "std": [0.2], "size": 8}
    run = Run.create(tmp_path / "run", origin)
    trainer = Trainer(None, deepreduce.PRESETS["quick"](), Stages(DATA, Settings(), run), Teaching(nn.Identity()))  # type: ignore[arg-type]
    own = trainer._config("S2")
    assert {name: own[name] for name in origin} == origin


@pytest.mark.parametrize("option", ["size", "fit", "channels"])
def test_a_run_decides_how_its_images_are_read(tmp_path: Path, option: str) -> None:
    given = {option: GIVEN[option]}
    with pytest.raises(ShoalError, match=f"found --{option} with --teacher; need the images of the teacher's run"):
        distill.Request("resnet10", **given).check_taught()
    Run.create(tmp_path / "run", {"data": "digits", "seed": 0})
    with pytest.raises(ShoalError, match=f"found --{option} with the run"):
        self_distill.Request(str(tmp_path / "run"), **given).config()


# ---- from a folder to a query


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `set` of images of different sizes, beside which commands run; the first image, 7 wide and 12 high."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            for i in range(4):
                path = tmp_path / "set" / part / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels(12 - i, 7 + i, 3)).save(path)
    return tmp_path / "set" / "train" / "cat" / "0.png"


def compiled(out: Path, **options: Any) -> tuple[Program, Any]:
    """The program of an untrained network in a run with these options, and the run's data."""
    request = train.Request("resnet10", "set", width=0.125, **options)
    run = Run.create(out / "run", request.config())
    data = load_data(run.config(), None)
    spec = Spec("resnet10", data.classes, data.shape, 0.125)
    save_network(run, spec, assemble(spec))
    compile_run(run.folder, out / "artifact", Compilation())
    return Program.load(out / "artifact" / "client"), data


@pytest.mark.parametrize("fit", [*FITS, None])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_query_reads_an_image_as_training_did(tmp_path: Path, images: Path, fit: str | None, channels: int) -> None:
    program, data = compiled(tmp_path, size="16x8", fit=fit, channels=channels)
    assert program.input_shape == data.shape == (channels, 16, 8)
    assert program.preprocessing["fit"] == (fit or "stretch")
    asked = pixels_of(images, program)
    assert asked.dtype == np.float32
    assert any(np.array_equal(image.numpy(), asked) for image in [*data.train.images, *data.val.images])


def test_an_artifact_without_a_rule_has_no_such_key_and_refuses_other_sizes(tmp_path: Path, images: Path) -> None:
    for path in (tmp_path / "set").rglob("*.png"):
        Image.open(path).resize((7, 12)).save(path)
    program, _ = compiled(tmp_path)
    assert program.preprocessing.keys() == {"mean", "std", "class_names"}
    assert pixels_of(images, program).shape == (3, 12, 7)
    Image.open(images).resize((12, 7)).save(images)
    with pytest.raises(ShoalError, match=r"an image of 12x7 \(width x height\) at .*0\.png; need 7x12; resize it"):
        pixels_of(images, program)


def test_a_query_refuses_a_rule_that_it_does_not_know(tmp_path: Path, images: Path) -> None:
    program, _ = compiled(tmp_path, size="16")
    for rule in ("squeeze", ["crop"], 3):
        odd = replace(program, preprocessing=program.preprocessing | {"fit": rule})
        with pytest.raises(ShoalError, match="at fit; need one of stretch, crop, pad"):
            pixels_of(images, odd)


def test_the_command_line_takes_the_options(tmp_path: Path, images: Path) -> None:
    words = ("resnet10", "--data", "set", "--width", "0.125", "--epochs", "1")
    with pytest.raises(ShoalError, match=r"need .* like .*; resize it, or give --size"):
        call("train", *words, "--out", "none")
    call("train", *words, "--size", "16x12", "--fit", "crop", "--channels", "1", "--out", "run")
    config = Run("run").config()
    assert {name: config[name] for name in SIZING} == {"size": [16, 12], "fit": "crop", "channels": 1}
    assert load_data(config, None).shape == (1, 16, 12)
    call("train", *words, "--size", "16x12", "--fit", "crop", "--channels", "1", "--out", "run", "--resume")
    with pytest.raises(ShoalError, match="found fit = 'crop' in the run"):
        call("train", *words, "--size", "16x12", "--fit", "pad", "--channels", "1", "--out", "run", "--resume")


def test_one_tiny_image_is_refused_in_one_sentence(tmp_path: Path, images: Path) -> None:
    words = ("resnet10", "--data", "set", "--width", "0.125", "--epochs", "1", "--limit", "1")
    with pytest.raises(ShoalError, match=r"found a batch of one image, .* at a batch norm; need .*--limit"):
        call("train", *words, "--size", "4", "--out", "small")
    call("train", *words, "--size", "16", "--out", "run")
