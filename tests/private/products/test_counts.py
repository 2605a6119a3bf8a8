"""The closed forms of the packed products' bytes, against what crosses a connection."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shoal.private.products import bfv
from shoal.private.products.counts import KEY_BYTES, READY, work
from shoal.private.products.packing import Convolution, pack
from shoal.private.program.steps import Step
from tests.private.products.test_bfv import run

SHAPES = {
    "stride": Convolution(6, 9, 8, 5, (3, 3), (2, 2), (1, 1)),
    "several answers and inputs": Convolution(5, 32, 32, 9, (3, 3), (1, 1), (1, 1)),
    "groups": Convolution(8, 16, 16, 12, (3, 3), (1, 1), (1, 1), groups=4),
    "depthwise": Convolution(40, 14, 14, 40, (3, 3), (1, 1), (1, 1), groups=40),
    "tiles": Convolution(2, 100, 90, 3, (5, 3), (1, 1), (2, 1)),
    "1x1 with a stride": Convolution(12, 16, 16, 20, (1, 1), (2, 2)),
    "linear": Convolution(300, 1, 1, 50),
}


@pytest.mark.parametrize("name", SHAPES)
def test_bytes_on_the_connection_are_the_closed_form(name: str) -> None:
    conv, count = SHAPES[name], 2
    random, packing = np.random.default_rng(0), pack(conv, bfv.DEGREE)
    weights = random.integers(-99, 99, (conv.outputs, conv.channels // conv.groups, *conv.kernel))
    masks = random.integers(0, 2**64, (count, conv.channels, conv.height, conv.width), np.uint64)
    _, _, client, server = run(weights, masks, conv, Step("c", "conv2d", ("x",), (conv.outputs, *conv.result)))
    found, (key, *requests), (ready, *answers) = work(packing, count), server.heard, client.heard
    assert ready == READY
    assert len(key) == KEY_BYTES
    assert sum(map(len, requests)) == found.up
    assert sum(map(len, answers)) == found.down
    assert len(requests) + len(answers) == found.messages


def test_the_shapes_are_of_every_kind() -> None:
    packings = {name: pack(conv, bfv.DEGREE) for name, conv in SHAPES.items()}
    assert packings["tiles"].count > 1
    assert packings["depthwise"].products < packings["depthwise"].answers * packings["depthwise"].inputs
    assert min(packings["several answers and inputs"].answers, packings["several answers and inputs"].inputs) > 1


def test_a_batch_shares_only_the_transforms_of_weights() -> None:
    packing = pack(SHAPES["tiles"], bfv.DEGREE)
    one, four = work(packing), work(packing, 4)
    per_item = ("products", "sent", "answers", "messages", "up", "down")
    assert four == replace(one, **{name: 4 * getattr(one, name) for name in per_item})
    assert one.products == packing.count * one.transforms
