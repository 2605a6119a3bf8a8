"""Prepared inferences of both parties in one process, from dealt randomness, in exact ring arithmetic."""

from __future__ import annotations

import secrets
from dataclasses import replace

import numpy as np
import torch

from shoal.private.program.program import Program
from shoal.private.program.steps import TRUNCATING
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.offline import prepare
from shoal.private.protocol.online import Inference, Prepared
from shoal.private.protocol.randomness import new_seed
from shoal.private.protocol.signs import Side
from tests.support.dealing import Dealer, MemoryWire, both, wires
from tests.support.parties import Case


def new_name() -> str:
    """The name of a new item, as a client draws it."""
    return f"{secrets.token_hex(16)}-000000"


class Recording(Inference):
    """Notes its own share of everything that it truncates."""

    def __init__(self, prepared: Prepared, side: Side, shares: dict[str, np.ndarray]) -> None:
        super().__init__(prepared, side)
        self.shares = shares

    def truncate(self, words: torch.Tensor) -> torch.Tensor:
        assert self.step is not None
        if self.side.client:
            self.shares[self.step.name] = words.numpy().copy()
        return super().truncate(words)


def infer(
    case: Case, program: Program, image: np.ndarray, shares: dict[str, np.ndarray] | None = None
) -> tuple[list[np.ndarray], tuple[MemoryWire, MemoryWire]]:
    """The client's logits of one image, and both wires; its shares of what is truncated go into `shares`.

    What the parties exchange is compared with the closed forms.
    """
    noted = {} if shares is None else shares
    layout, dealer, ends, name = Layout(program), Dealer(program, case.weights), wires(), new_name()
    seeds = {c: new_seed() for c in (True, False)}

    def work(client: bool) -> list[np.ndarray]:
        (half,) = prepare(layout, dealer.engine(client), client, [seeds[client]])
        prepared = Prepared(layout, None if client else case.weights)
        words = torch.from_numpy(image[None].astype(np.int64)) if client else None
        return [y.numpy() for y in Recording(prepared, Side(client, ends[not client], half, name), noted).run(words)]

    logits, none = both(work)
    assert none == []
    for end in ends:
        said, online = end.traffic, layout.online
        assert (said.messages, said.latencies) == (online.messages, online.latencies)
        assert said.sent + said.received + 8 * said.messages == online.bytes
    # All that the client receives, but for the logits, comes while it sends as much.
    exchanged = ends[0].traffic.received - 8 * sum(y.size for y in logits)
    exchanges = layout.online.messages - layout.online.latencies
    assert layout.serial_bytes == layout.online.bytes - exchanged - 8 * exchanges
    return logits, ends


def truncating(program: Program, exact: str) -> Program:
    """`program` with none of its truncations exact, those that `compile` chose, or all, in a ring of so many bits."""
    steps = [s.name for s in program.steps if s.op in TRUNCATING]
    most = max(program.exact.values())
    table = {"none": {}, "compiled": program.exact}
    table |= {"wide": dict.fromkeys(steps, 64), "all narrow": dict.fromkeys(steps, most)}
    return replace(program, exact=table[exact])
