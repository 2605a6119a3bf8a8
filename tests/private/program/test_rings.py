"""Rings of exact truncations hold the product before the bias is added, and networks without a ReLU work."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from shoal.private.compiler.compilation import compile
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.offline import prepare
from shoal.private.protocol.online import Inference, Prepared
from shoal.private.protocol.randomness import new_seed
from shoal.private.protocol.signs import Side
from shoal.surgery.tracing import trace
from tests.support.dealing import Dealer, both, wires

SHAPE = (1, 4, 4)


class Cancelling(nn.Module):
    """A layer whose large bias cancels a large product: its result is small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.relu = nn.ReLU()
        self.last = nn.Linear(32, 3)
        with torch.no_grad():
            self.conv.weight.fill_(8.0)
            self.conv.bias.fill_(-64.0)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.conv(x)).flatten(1))


class Linear(nn.Module):
    """A network without a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.last = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x).flatten(1))


def test_a_ring_holds_the_product_without_its_bias() -> None:
    images = 8 + 0.1 * torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(1))
    program, weights = compile(trace(Cancelling().eval(), SHAPE), images, max_failure=0.0)
    words = weights.arrays["conv.weight"].astype(object).ravel()[0]
    product = int(abs(words)) * round(float(images.max()) * 2**program.fraction_bits)
    assert 4 * product < 1 << program.exact["conv"]


def test_a_network_without_a_relu_is_prepared_and_queried() -> None:
    images = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(1))
    graph = trace(Linear().eval(), SHAPE)
    program, weights = compile(graph, images)
    layout, dealer, ends = Layout(program), Dealer(program, weights), wires()
    halves = both(lambda client: prepare(layout, dealer.engine(client), client, [new_seed()]))
    words = (images[:1] * 2**program.fraction_bits).round().to(torch.int64)

    def work(client: bool) -> list[Tensor]:
        party, rows = Prepared(layout, None if client else weights), halves[0 if client else 1]
        side = Side(client, ends[0 if client else 1], rows[0], "item")
        return list(Inference(party, side).run(words if client else None))

    logits = both(work)[0][-1].numpy() * 2.0**-program.fraction_bits
    with torch.no_grad():
        assert np.abs(logits - graph(images[:1])[-1].numpy()).max() <= program.error_bound
