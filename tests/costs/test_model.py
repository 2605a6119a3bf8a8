"""The cost model of prepared inference: exact where it can be, and monotonic where it forecasts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.costs.links import LINKS, Link
from shoal.costs.machine import Machine
from shoal.costs.model import layout_of, prepared_cost
from shoal.errors import ShoalError
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.measuring.fitting import fit
from shoal.measuring.rehearsal import stock
from shoal.models import build
from shoal.private.compiler.compilation import compile
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.pool import Pool
from shoal.private.transport.certs import make_certificates
from shoal.surgery.tracing import trace
from tests.support.parties import Everything, case, seeded

SHAPE = (3, 16, 16)
NAMES = ("resnet10", "resnet20", "wrn-16-4")


def folded(name: str, width: float) -> Graph:
    torch.manual_seed(0)
    return fold(trace(build(name, 10, width=width).eval(), SHAPE))


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_before_compilation_is_that_after_it_but_for_bits(name: str) -> None:
    graph = folded(name, 0.25)
    program, _ = compile(graph, torch.rand(8, *SHAPE) * 2 - 1)
    guessed, compiled = layout_of(graph), Layout(program)
    assert [s.name for s in guessed.steps] == [s.name for s in compiled.steps]
    assert {n: r.count for n, r in guessed.relus.items()} == {n: r.count for n, r in compiled.relus.items()}
    assert guessed.schedule.rides == compiled.schedule.rides
    for phase in ("offline", "online"):
        a, b = (getattr(prepared_cost(layout), phase) for layout in (guessed, compiled))
        assert 0.8 < a.bytes / b.bytes < 1.25


@pytest.mark.parametrize("name", NAMES)
def test_less_work_is_never_dearer(name: str) -> None:
    wide, narrow = layout_of(folded(name, 0.5)), layout_of(folded(name, 0.25))
    for link in LINKS.values():
        big, small = (prepared_cost(layout, link=link) for layout in (wide, narrow))
        assert small.offline.seconds < big.offline.seconds
        assert small.online.seconds < big.online.seconds
        assert small.disk_bytes < big.disk_bytes
    slow, fast = (prepared_cost(wide, link=Link(rate, 0.01)) for rate in (1e6, 1e9))
    assert slow.online.seconds > fast.online.seconds
    assert slow.offline.seconds > fast.offline.seconds


def test_link_seconds_are_the_latencies_and_the_bytes() -> None:
    layout, machine = layout_of(folded("resnet10", 0.25)), Machine()
    here, there = (prepared_cost(layout, machine, link).online for link in (Link(), Link(8e6, 0.1)))
    latencies = layout.online.latencies + 2  # and the request for an item, with its answer
    assert there.seconds - here.seconds == pytest.approx(latencies * 0.05 + layout.serial_bytes / 1e6)
    assert layout.online.bytes / 2 < layout.serial_bytes < layout.online.bytes


def test_a_fit_finds_the_constants_that_made_the_seconds() -> None:
    table = torch.rand(7, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e2, 1e6, 1e9])
    true = torch.tensor([3e-3, 2e-4, 1e-7, 1e-10])
    seconds = (table.double() @ true.double()).numpy()
    # Constants in the usual proportions, on a machine of another speed, are found whatever is typical.
    assert fit(table.tolist(), seconds, (5 * true).tolist()) == pytest.approx(true.tolist(), rel=1e-4)
    odd = fit(table.tolist(), seconds, (true * torch.tensor([1.0, 2.0, 1.0, 0.5])).tolist())
    assert (table.double().numpy() @ odd / seconds) == pytest.approx(1.0, abs=0.05)


def test_a_fit_leaves_what_the_networks_do_not_tell_apart_typical() -> None:
    found = fit([[1.0, 2.0], [2.0, 4.0]], np.array([8.0, 16.0]), [1.0, 0.5])
    assert found == pytest.approx([4.0, 2.0])


def test_constants_survive_the_disk_and_strangers_do_not(tmp_path: Path) -> None:
    machine = Machine(product_s=1.5)
    machine.save(tmp_path / "machine.json")
    assert Machine.load(tmp_path / "machine.json") == machine
    written = json.loads((tmp_path / "machine.json").read_text())
    old = {name: value for name, value in written.items() if not name.startswith("seal_")} | {"direct_relu_s": 1e-5}
    for bad, found in (
        ({}, "no constants of a machine"),
        ([], "no constants of a machine"),
        (asdict(machine), "no constants of a machine"),
        (written | {"and_s": "fast"}, "a constant that is no number"),
        (written | {"and_s": -1.0}, "a constant that is no number"),
        (old, "a machine without seal_transform_s, seal_product_s, seal_input_s, seal_answer_s, seal_start_s"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(ShoalError, match=f"found {found}.*need what shoal calibrate wrote.*; calibrate again"):
            Machine.load(tmp_path / "bad.json")


def test_rehearsal_items_are_as_large_as_real_ones(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    made = case(seeded(Everything), tmp_path / "artifact", {})
    make_certificates(tmp_path / "certs")
    layout = Layout(made.program)
    stock(layout, (tmp_path / "c", tmp_path / "s"), tmp_path / "certs" / "client.pem", 3, "")
    pool = Pool(tmp_path / "c" / made.program.digest()[:16], layout, True)
    assert len(pool.names()) == 3
    assert pool.bytes() / 3 == pytest.approx(layout.stored_bytes(True), abs=4096)
    pool.close()
