"""The cost of the offline phase: counts of each kind of work from a layout, seconds from a machine's constants.

SEAL multiplies the steps that have a packing (`sealed`). SPU multiplies the others, those with a ring of more
than 42 bits, and makes all ANDs and products of bits and words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.costs.links import Link
from shoal.costs.machine import Machine
from shoal.costs.protocols import PrivateCost, cheetah_blocks
from shoal.private.engine.shapes import parameter_shapes
from shoal.private.products.counts import AHEAD, KEY_BYTES, Work, work
from shoal.private.products.packing import Packing
from shoal.private.products.parameters import fitting, packings
from shoal.private.program.steps import Step
from shoal.private.protocol.layout import Layout

AND_BYTES, CHOSEN_BYTES = 32.0, 16.25
"""Bytes, both ways, of an AND of two 64-bit words and of a product of a bit and a word (SPU 0.9.5, FM64)."""
REFILL_BYTES, REFILL = 266_259, 10_500_000
"""Bytes and correlated oblivious transfers of one refill of Ferret. An AND of two bits uses one in each direction."""


@dataclass(frozen=True)
class Products:
    """SPU's work for one linear step and one image: ciphertext products, automorphisms, bytes both ways."""

    products: float
    automorphisms: float
    bytes: float


@dataclass(frozen=True)
class Share:
    """One kind of work in the forecast for an item: seconds of computation, bytes both ways, and round trips."""

    seconds: float
    bytes: float
    rounds: float


def packed(layout: Layout, batch: int = 1) -> dict[str, Work]:
    """SEAL's work for each step that it multiplies, for `batch` items that are made together."""
    return {name: work(packing, batch) for name, packing in sealed(layout).items()}


def sealed(layout: Layout) -> dict[str, Packing]:
    """The packing of each step that SEAL multiplies: those that the program states, or else all that fit."""
    return packings(layout.program) if layout.program.products else fitting(layout.program)


def homomorphic(layout: Layout, step: Step, batch: int = 1) -> Products:
    """SPU's work for one linear step and one image, which is 1 / `batch` of the work for a batch."""
    kernel = parameter_shapes(layout.program)[f"{step.name}.weight"]
    groups = step.attrs.get("groups", 1)
    rows = batch * math.prod(step.shape[1:])
    if math.prod(kernel[:-1]) == 1 and groups == step.shape[0]:
        # A batch norm alone takes one product per value, and no matrix product.
        return Products(0.0, 0.0, CHOSEN_BYTES * math.prod(step.shape))
    blocks = cheetah_blocks(rows, math.prod(kernel[:-1]), kernel[-1] // groups)
    share = groups / batch
    return Products(share * blocks.products, share * blocks.automorphisms, share * (blocks.sent + blocks.returned))


def chosen_words(layout: Layout) -> float:
    """Number of products of a bit and a word in the offline phase: one per kept ReLU.

    A bit that becomes a word counts as half of one: one per kept ReLU and one per exact truncation.
    """
    kept = sum(relu.count for relu in layout.relus.values())
    return kept + (kept + sum(layout.exact.values())) / 2


def offline_cost(layout: Layout, machine: Machine, link: Link, batch: int = 1) -> PrivateCost:
    """The forecast for one of `batch` items that are made together; without the keys that SPU makes for a session.

    Seconds on the link are an upper limit: they are added to those of the computation, which may overlap with them.
    """
    shares = (
        seal_share(packed(layout, batch), machine, batch),
        spu_share(layout, machine, batch),
        bits_share(layout, machine, batch),
    )
    seconds, size, rounds = (sum(getattr(s, name) for s in shares) for name in ("seconds", "bytes", "rounds"))
    return PrivateCost(seconds + 8 * size / link.rate + rounds * link.rtt_s, round(size), rounds)


def seal_share(works: dict[str, Work], m: Machine, batch: int) -> Share:
    """SEAL's products for one item. The client sends AHEAD messages before it waits, so a round trip serves as many."""
    if not works:
        return Share(0.0, 0.0, 0.0)
    seconds = m.seal_start_s + sum(
        m.seal_transform_s * w.transforms
        + m.seal_product_s * w.products
        + m.seal_input_s * w.sent
        + m.seal_answer_s * w.answers
        for w in works.values()
    )
    size = KEY_BYTES + sum(w.up + w.down for w in works.values())
    rounds = 1 + sum(w.messages for w in works.values()) / (2 * AHEAD)
    return Share(seconds / batch, size / batch, rounds / batch)


def spu_share(layout: Layout, m: Machine, batch: int) -> Share:
    """SPU's products for one item: the steps without a packing, each in one call for a batch."""
    packed = sealed(layout)
    works = [homomorphic(layout, step, batch) for step in layout.linear if step.name not in packed]
    calls = len(works) / batch
    seconds = sum(m.product_s * w.products + m.automorphism_s * w.automorphisms for w in works)
    return Share(seconds + m.run_s * calls, sum(w.bytes for w in works), 2.0 * calls)


def bits_share(layout: Layout, m: Machine, batch: int) -> Share:
    """ANDs, and products of bits and words, for one item. Additional calls for long vectors are not counted."""
    ands, chosen = layout.word_ands, chosen_words(layout)
    calls = (layout.and_rounds + bool(layout.relus) + bool(layout.relus or layout.exact)) / batch
    size = AND_BYTES * ands + CHOSEN_BYTES * chosen + 2 * REFILL_BYTES * (64 * ands + chosen) / REFILL
    return Share(m.and_s * ands + m.chosen_s * chosen + m.run_s * calls, size, 2.0 * calls)
