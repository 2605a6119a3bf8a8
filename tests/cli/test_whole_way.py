"""From a checkpoint that was trained elsewhere to the name of an image's class, between two processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shoal.data.dataset import Dataset
from shoal.data.images import read_image
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network
from shoal.private.transport.certs import TLS
from shoal.recipes.stages import Stages, train_teacher
from shoal.storage.run import Run
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings
from tests.cli.test_commands import call
from tests.conftest import Residual, blobs
from tests.support.processes import ROOT, shoal, tls_words
from tests.support.waiting import HANG, eventually

NAMES = ("north-west", "north-east", "south-west", "south-east")
ASKED = 3


def asked(*words: object) -> str:
    """The standard output of a command in a process of its own."""
    command, environment = (
        [sys.executable, "-m", "shoal", *map(str, words)],
        os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "300"},
    )
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images by class, split into train and test."""
    folder, data = tmp_path_factory.mktemp("images"), blobs()
    for part in ("train", "test"):
        split = getattr(data, part)
        for i, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
            place = folder / part / NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(place / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user brings: the weights of a network that was trained on these images, in a file of torch.save."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, path = Dataset.from_folder(images, channels=1), tmp_path_factory.mktemp("elsewhere") / "net.pth"
    spec, schedule = Spec("given", len(NAMES), data.shape), Schedule(8, 0.1, (6,), batch_size=16)
    network, _ = train_teacher(spec, schedule, Stages(data, Settings()), base=Residual())
    torch.save({"state_dict": network.state_dict()}, path)
    return path


def artifact(checkpoint: Path, images: Path, out: Path) -> Path:
    """Adopt, reduce and compile."""
    call(
        "adopt",
        "tests.conftest:Residual",
        "--weights",
        checkpoint,
        "--data",
        images,
        "--channels",
        "1",
        "--out",
        out / "adopted",
        "--json",
    )
    words = ("--preset", "quick", "--budget", "200", "--epochs", "1,2,2", "--out", str(out / "reduced"), "--json")
    body = json.loads(call("reduce", out / "adopted", *words))
    assert 0 < body["reduced"]["relus"] <= 200 < body["baseline"]["relus"]
    call("compile", out / "reduced", "--ot-kind", "YACL_Softspoken", "--out", out / "artifact", "--json")
    return out / "artifact"


@pytest.mark.slow
@pytest.mark.private
def test_a_checkpoint_becomes_a_private_answer_with_the_name_of_the_class(
    checkpoint: Path, images: Path, certs: dict[str, TLS], tmp_path: Path, spu: None
) -> None:
    made, ready = artifact(checkpoint, images, tmp_path), tmp_path / "ready"
    files = [sorted((images / "test" / name).iterdir())[0] for name in NAMES[:ASKED]]
    pool, where = ("--pool", tmp_path / "pool"), tls_words(certs["client"])
    served = ("--listen", "127.0.0.1:0", "--pool", tmp_path / "served", "--ready-file", ready)
    with shoal("serve", made / "server", *served, *tls_words(certs["server"])) as server:
        assert eventually(lambda: server.poll() is not None or (ready.exists() and ready.read_text().endswith("\n")))
        to = ("--connect", ready.read_text().strip(), *where, *pool)
        asked("prepare", made / "client", "--count", ASKED + 1, *to)
        shown = asked("query", made / "client", *files, *to)
    truth = in_the_clear(tmp_path / "reduced", images, files)
    assert [class_of(file, shown) for file in files] == truth
    assert "prepared items left: 1" in shown
    assert len(set(truth)) > 1


def class_of(file: Path, shown: str) -> str:
    """What the table of `shoal query` has beside an image."""
    (row,) = [line.split() for line in shown.splitlines() if file.name in line]
    return next(after for word, after in itertools.pairwise(row) if word.endswith(file.name))


def in_the_clear(run: Path, images: Path, files: list[Path]) -> list[str]:
    """The names of the classes that the reduced network itself gives."""
    _, network = load_network(Run(run))
    data = Dataset.from_folder(images, channels=1)
    pixels = np.stack([read_image(file, 1) for file in files])
    with torch.no_grad():
        logits = network(data.normalise(torch.from_numpy(pixels).to(torch.uint8)))
    return [data.class_names[i] for i in logits.argmax(1).tolist()]
