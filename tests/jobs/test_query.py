"""`shoal query` as its user sees it: names and probabilities, items that are left, and the order of errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoal.cli.fields import docs_of
from shoal.errors import ShoalError
from shoal.jobs import query as job
from shoal.private.compiler.compilation import compile
from shoal.private.program.artifact import save_artifact
from shoal.private.serving.client import ON_DEMAND, Client
from shoal.private.serving.options import ClientOptions, ServerOptions
from shoal.private.serving.server import Server
from shoal.private.transport.certs import TLS
from tests.support.dealing import stock
from tests.support.parties import Case
from tests.support.processes import in_thread

NAMES = ["ant", "bee", "cow", "dog", "eel"]
MEAN, STD = 0.25, 0.5


@pytest.fixture(scope="module")
def named(small: Case, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The small network with class names and a normalisation in its artifact, and pixels as its images."""
    pixels = torch.randint(0, 256, (16, *small.program.input_shape), generator=torch.Generator().manual_seed(2))
    images, folder = (pixels / 255 - MEAN) / STD, tmp_path_factory.mktemp("named")
    facts = {"mean": [MEAN], "std": [STD], "class_names": NAMES}
    program, weights = compile(small.graph, images, preprocessing=facts)
    save_artifact(folder, program, weights, ot_kind="YACL_Softspoken")
    for i in range(3):
        Image.fromarray(pixels[i, 0].numpy().astype(np.uint8)).save(folder / f"{i}.png")
    return replace(small, program=program, weights=weights, folder=folder, images=images)


@pytest.fixture
def connection(named: Case, certs: dict[str, TLS], tmp_path: Path, spu: None) -> Iterator[job.Connection]:
    """A server with three prepared items, which the client has in tmp_path/pool."""
    stock(named, tmp_path / "pool", tmp_path / "served", certs["client"].cert, 3)
    options = ServerOptions(pool=tmp_path / "served")
    with in_thread(Server(named.folder, "127.0.0.1:0", certs["server"], options)) as server:
        tls = certs["client"]
        yield job.Connection(cert=tls.cert, key=tls.key, ca=tls.ca, connect=server.address)


def ask(
    named: Case,
    connection: job.Connection,
    pool: Path,
    count: int = 2,
    half: str = "client",
    images: Path | None = None,
) -> dict[str, Any]:
    files = tuple((images or named.folder) / f"{i}.png" for i in range(count))
    return job.query(named.folder / half, job.Query(files), connection, ClientOptions(pool=pool))


@pytest.mark.private
def test_names_probabilities_and_items_left(named: Case, connection: job.Connection, tmp_path: Path) -> None:
    body, truth = ask(named, connection, tmp_path / "pool"), torch.from_numpy(named.truth(2))
    assert body["items_left"] == 1
    for row, logits in zip(body["results"], truth, strict=True):
        chances = logits.softmax(0)
        order = chances.argsort(descending=True).tolist()
        assert [part["class"] for part in row["top"]] == [NAMES[i] for i in order]
        assert [part["probability"] for part in row["top"]] == pytest.approx(chances[order].tolist(), abs=0.01)
        assert (row["class"], row["probability"]) == (NAMES[order[0]], row["top"][0]["probability"])
    shown = job.query_table(body)
    assert shown.rows[0][1] == body["results"][0]["class"]
    assert shown.caption == "prepared items left: 1"
    assert (body["made"], body["making_s"]) == (0, 0)
    assert job.query_table(body | {"made": 2, "making_s": 7.5}).caption == (
        "no item was ready; made 2 in 7.50 s; prepared items left: 1"
    )


def test_the_help_says_how_many_items_a_query_makes() -> None:
    assert f"makes at most {ON_DEMAND} when" in docs_of(job.Query)["top_up"]


@pytest.mark.private
def test_errors_of_the_connection_come_before_items_are_made(
    named: Case, connection: job.Connection, tmp_path: Path
) -> None:
    away = replace(connection, connect="127.0.0.1:1")
    with pytest.raises(ShoalError, match=r"127\.0\.0\.1:1"):
        ask(named, away, tmp_path / "empty")
    with pytest.raises(
        ShoalError, match=r"found the server's half of an artifact at .*need the client's; give client/"
    ):
        ask(named, away, tmp_path / "empty", half="server")


def test_each_party_is_told_that_it_has_the_others_half(named: Case, certs: dict[str, TLS], spu: None) -> None:
    with pytest.raises(
        ShoalError, match=r"found the client's half of an artifact at .*need the server's; give server/"
    ):
        Server(named.folder / "client", "127.0.0.1:0", certs["server"], ServerOptions())


def test_an_image_beyond_calibration_is_named_before_anything_is_connected(named: Case, tmp_path: Path) -> None:
    save_artifact(tmp_path, replace(named.program, input_limit=1.0), named.weights)
    nowhere = job.Connection(connect="127.0.0.1:1")
    with pytest.raises(ShoalError, match=r"^found a value of magnitude .* at .*0\.png; need at most 1, .*; normalise"):
        ask(replace(named, folder=tmp_path), nowhere, tmp_path / "pool", images=named.folder)


@pytest.mark.private
def test_a_client_refuses_an_image_beyond_calibration(named: Case, tmp_path: Path, spu: None) -> None:
    client = Client(named.folder, "127.0.0.1:1", None, ClientOptions(pool=tmp_path, insecure=True))
    with pytest.raises(ShoalError, match="found a value of magnitude 99 at image 0; need at most"):
        client.query(np.full((1, *named.program.input_shape), 99, np.float32))
    client.close()
