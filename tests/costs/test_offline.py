"""The cost model of the offline phase: who multiplies which step, and what that takes, by counts."""

from __future__ import annotations

import functools
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from shoal.costs.links import Link
from shoal.costs.machine import Machine
from shoal.costs.model import layout_of, prepared_cost
from shoal.costs.offline import (
    bits_share,
    chosen_words,
    homomorphic,
    offline_cost,
    packed,
    seal_share,
    spu_share,
)
from shoal.graph.folding import fold
from shoal.measuring.fitting import constants, offline_constants, online_row, seal_rows, spu_rows
from shoal.models import build
from shoal.private.products.counts import KEY_BYTES
from shoal.private.products.parameters import MOST_PLAIN_BITS
from shoal.private.program.steps import LINEAR
from shoal.private.protocol.layout import Layout
from shoal.private.serving.prepared import Offline
from shoal.surgery.tracing import trace

FREE = Machine(**dict.fromkeys((field.name for field in fields(Machine)), 0.0))
SEAL = {
    "seal_transform_s": "transforms",
    "seal_product_s": "products",
    "seal_input_s": "sent",
    "seal_answer_s": "answers",
}
"""Constants of SEAL's products, and the count that each of them multiplies."""


@functools.cache
def layout(name: str = "resnet10", width: float = 0.5) -> Layout:
    """A layout with two rings of one bit more than SEAL multiplies in."""
    torch.manual_seed(0)
    program = layout_of(fold(trace(build(name, 10, width=width).eval(), (3, 32, 32)))).program
    wide = [step.name for step in program.steps if step.op in LINEAR][3::9]
    return Layout(replace(program, exact=program.exact | dict.fromkeys(wide, MOST_PLAIN_BITS + 1)))


def by_spu() -> Layout:
    """The layout with all rings of one bit more than SEAL multiplies in."""
    program = layout().program
    return Layout(replace(program, exact=dict.fromkeys(program.exact, MOST_PLAIN_BITS + 1)))


def test_only_rings_that_fit_are_priced_as_seal_s() -> None:
    own = layout()
    assert set(packed(own)) == {s.name for s in own.linear if own.program.exact.get(s.name, 64) <= MOST_PLAIN_BITS}
    assert 0 < len(packed(own)) < len(own.linear)
    wide = by_spu()
    assert not packed(wide)
    assert seal_share(packed(wide), Machine(), 1).bytes == 0
    assert spu_share(wide, Machine(), 1).bytes == sum(homomorphic(wide, step).bytes for step in wide.linear)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("constant", SEAL)
def test_seconds_of_seal_are_its_counts_times_its_constants(constant: str, batch: int) -> None:
    count = sum(getattr(work, SEAL[constant]) for work in packed(layout(), batch).values())
    spent = offline_cost(layout(), replace(FREE, **{constant: 1.0}), Link(), batch)
    assert spent.seconds == pytest.approx(count / batch)


def test_every_constant_of_the_offline_phase_has_its_count() -> None:
    own, calls = layout(), len(layout().linear) - len(packed(layout())) + layout().and_rounds + 2
    spu = [homomorphic(own, step, 2) for step in own.linear if step.name not in packed(own)]
    counts = {"and_s": own.word_ands, "chosen_s": chosen_words(own), "run_s": calls / 2, "seal_start_s": 1 / 2}
    counts |= {"product_s": sum(w.products for w in spu), "automorphism_s": sum(w.automorphisms for w in spu)}
    for constant, count in counts.items():
        assert offline_cost(own, replace(FREE, **{constant: 1.0}), Link(), 2).seconds == pytest.approx(count)


def test_bytes_are_those_of_both_engines_and_of_one_key_for_a_batch() -> None:
    works = packed(layout(), 4).values()
    assert seal_share(packed(layout(), 4), FREE, 4).bytes == (KEY_BYTES + sum(w.up + w.down for w in works)) / 4
    shares = (seal_share(packed(layout()), FREE, 1), spu_share(layout(), FREE, 1), bits_share(layout(), FREE, 1))
    spent = offline_cost(layout(), FREE, Link(rate=8.0, rtt_s=1.0))
    assert spent.bytes == round(sum(share.bytes for share in shares))
    assert spent.seconds == pytest.approx(sum(share.bytes + share.rounds for share in shares))


def test_a_batch_shares_transforms_of_weights_and_automorphisms() -> None:
    for own in (layout(), by_spu()):
        alone, shared = (prepared_cost(own, batch=batch).offline for batch in (1, 16))
        assert shared.seconds < alone.seconds
        assert shared.bytes < alone.bytes
    for step in by_spu().linear:
        one, many = (homomorphic(by_spu(), step, batch) for batch in (1, 16))
        assert step.op == "linear" or many.automorphisms <= one.automorphisms


def test_a_calibration_counts_what_a_forecast_counts() -> None:
    """With seconds that a machine's constants give, the rows that the constants are fitted to add up to a forecast."""
    machine, own, items = Machine(), layout(), 4
    steps = dict.fromkeys((step.name for step in own.linear), 1.0)
    made = Offline([(items, {"kinds": {}, "steps": steps})])
    for rows, share in (
        (seal_rows(own, made), seal_share(packed(own, items), machine, items)),
        (spu_rows(own, made), spu_share(own, machine, items)),
    ):
        assert sum(spent(machine, row) for row in rows) == pytest.approx(items * share.seconds)
    assert len(seal_rows(own, made)) + len(spu_rows(own, made)) == len(own.linear)


def test_a_calibration_finds_every_constant() -> None:
    """Seconds that a machine's constants give are explained by the same constants."""
    own, machine, made = layout(), Machine(), list[Offline]()
    for items in (1, 4):
        whole = Offline([(items, {"kinds": {}, "steps": dict.fromkeys((step.name for step in own.linear), 1.0)})])
        rows = zip(packed(own), seal_rows(own, whole), strict=True)
        spu = [step.name for step in own.linear if step.name not in packed(own)]
        steps = {name: spent(machine, row) for name, row in (*rows, *zip(spu, spu_rows(own, whole), strict=True))}
        kinds = {"and": machine.and_s * own.word_ands, "chosen": machine.chosen_s * chosen_words(own)}
        facts = {kind: {"seconds": items * seconds, "bytes": 0.0} for kind, seconds in kinds.items()}
        made.append(Offline([(items, {"kinds": facts, "steps": steps})]))
    found = Machine(**offline_constants(own, made), **constants([online_row(own) | {"seconds": 0.1}]))
    for name in (field.name for field in fields(Machine)):
        if name not in online_row(own):
            assert getattr(found, name) == pytest.approx(getattr(machine, name), rel=1e-3)


def spent(machine: Machine, row: dict[str, float]) -> float:
    """The seconds of one row of a calibration, by the constants of `machine`."""
    return sum(getattr(machine, name) * count for name, count in row.items() if name != "seconds")


RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "private_offline.json"


@pytest.mark.slow
def test_bytes_of_the_benchmark_are_the_forecast() -> None:
    """ResNet18 with 49,600 ReLUs and three blocks replaced, measured between two processes."""
    from benchmarks.private.phases import sized

    body = json.loads(RESULT.read_text())
    own = layout_of(sized(body["settings"]["relus"], body["settings"]["blocks"], "resnet18"))
    for row in body["rows"]:
        if row["products"] == "seal":
            batch, measured = row["batch"], row["kinds"]["product"]["bytes"]
            forecast = seal_share(packed(own, batch), FREE, batch).bytes + spu_share(own, FREE, batch).bytes
            assert measured == pytest.approx(forecast, rel=1e-6)
