"""Every operation as the first step on the hidden image: its shares must be as uniform as those of features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.private.program.clear import run_clear
from shoal.private.program.steps import OPS
from shoal.private.protocol import online
from shoal.private.protocol.image import image_share
from tests.support.first_steps import IMAGE, ROWS, FirstStep
from tests.support.inferences import infer, new_name, truncating
from tests.support.parties import Case, case

UNITS = 40
"""Each truncation may be one unit off, and a layer after it multiplies that."""


@pytest.fixture(scope="module", params=OPS)
def first(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(3)
    op, row = request.param, ROWS[request.param]
    found = case(FirstStep(row), tmp_path_factory.mktemp(op), {}, shape=IMAGE)
    steps = found.program.steps
    # A linear layer reads a flattened image, which has the same shares.
    image = {found.program.input} | {s.name for s in steps if s.op == "flatten" and s.inputs[0] == found.program.input}
    assert any(step.op == op and image & set(step.inputs) for step in steps)
    return found


def worst(net: Case, exact: str, count: int = 3) -> float:
    """The largest difference from the clear executor over some images, in units."""
    images = net.images[:count].numpy()
    clear = run_clear(net.program, net.weights, images)[-1]
    program = truncating(net.program, exact)
    logits = [infer(net, program, np.rint(image / net.unit))[0][-1][0] for image in images]
    return float(np.abs(np.stack(logits) * net.unit - clear).max() / net.unit)


@pytest.mark.parametrize("exact", ["none", "compiled", "all narrow"])
def test_every_operation_may_read_the_image(first: Case, exact: str) -> None:
    assert worst(first, exact) <= UNITS


def test_without_the_pad_an_average_of_the_image_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = case(FirstStep(ROWS["avg_pool2d"]), tmp_path, {}, shape=IMAGE)

    def bare(item: str, shape: tuple[int, ...], image: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros((1, *shape), dtype=torch.int64) if image is None else image

    monkeypatch.setattr(online, "image_share", bare)
    assert worst(net, "none") > 1000 * UNITS


def test_the_shares_add_up_and_depend_on_the_item() -> None:
    image, name = torch.randint(-99, 99, (1, *IMAGE)), new_name()
    client, server = image_share(name, IMAGE, image), image_share(name, IMAGE, None)
    assert torch.equal(client + server, image)
    assert not torch.isin(image_share(new_name(), IMAGE, None), server).any()
    assert len(server.unique()) == server.numel()
