"""The cost of private inference: exact bytes and exchanges from a layout, seconds from a machine's constants.

The layout is that of a compiled program or, before compilation, of a graph with assumed numbers of bits (`layout_of`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from shoal.costs.links import Link
from shoal.costs.machine import Machine
from shoal.costs.offline import offline_cost
from shoal.costs.protocols import PrivateCost
from shoal.graph.graph import Graph
from shoal.graph.max_pool import expand_max_pools
from shoal.private.compiler.compilation import lower
from shoal.private.engine.shapes import parameter_shapes
from shoal.private.program.fixed import EXACT_BITS, FIELD_BITS
from shoal.private.program.program import VERSION, Program
from shoal.private.program.steps import Step
from shoal.private.protocol.layout import Layout
from shoal.private.protocol.lifting import schedule

CLAIM_LATENCIES = 2
"""One-way latencies before an inference: the client names the item that it spends, and the server answers."""
NARROW_BITS = 35
"""Assumed ring size, in bits, of a product that is truncated exactly; typical of trained networks."""


@dataclass(frozen=True)
class PreparedCost:
    """Cost of one inference: both phases, and the bytes on the two parties' disks together.

    Bytes are those of both directions; a round is two one-way latencies.
    """

    offline: PrivateCost
    online: PrivateCost
    disk_bytes: int


def layout_of(graph: Graph, sign_bits: int = 18, fraction_bits: int = 14) -> Layout:
    """The layout of a graph that is not compiled, with `sign_bits` for every sign.

    Linear layers, and steps whose wraps are sent together with the next signs (see `lifting.schedule`), get rings of
    `NARROW_BITS` bits. Raises ShoalError, naming the node, for operations without a private form.
    """
    steps, keep, outputs = lower(expand_max_pools(graph))
    bits = {s.name: sign_bits for s in steps if s.op == "relu"}
    shape = tuple(graph.input.shape)
    empty: dict[str, Any] = {"preprocessing": {}, "error_bound": 0.0, "sign_bits": bits}
    program = Program(VERSION, fraction_bits, FIELD_BITS, graph.input.name, shape, steps, outputs, keep, **empty)
    layout = Layout(program)
    everywhere = dict.fromkeys((s.name for s in layout.truncating), FIELD_BITS)
    rides = schedule(layout.steps, outputs, everywhere, fraction_bits, bits).rides
    program.exact.update({name: NARROW_BITS for names in rides.values() for name in names})
    program.exact.update({step.name: NARROW_BITS for step in layout.linear})
    return Layout(program)


def prepared_cost(
    layout: Layout, machine: Machine | None = None, link: Link | None = None, batch: int = 1
) -> PreparedCost:
    """The forecast for one inference of `layout`, with the offline phase of `batch` inferences done together."""
    machine, link = machine or Machine(), link or Link()
    disk = layout.stored_bytes(True) + layout.stored_bytes(False)
    return PreparedCost(offline_cost(layout, machine, link, batch), _online(layout, machine, link), disk)


def _online(layout: Layout, m: Machine, link: Link) -> PrivateCost:
    online = layout.online
    seconds = m.query_s + m.exchange_s * online.latencies + m.mac_s * macs(layout) + m.weight_s * weights(layout)
    seconds += m.relu_s * sum(relu.count for relu in layout.relus.values()) + m.value_s * linear_values(layout)
    return PrivateCost(seconds + link_seconds(layout, link), online.bytes, online.latencies / 2)


def link_seconds(layout: Layout, link: Link) -> float:
    """Seconds of a prepared query that pass on `link`: its bytes at the link's rate, and its latencies.

    It includes the request for an item, which the one-way latencies of `Layout.online` do not have.
    """
    return 8 * layout.serial_bytes / link.rate + (layout.online.latencies + CLAIM_LATENCIES) * link.rtt_s / 2


def macs(layout: Layout) -> int:
    """Number of float64 multiply-adds of the linear layers, over all limbs."""
    return sum(_limbs(layout, step) * math.prod(shape) * math.prod(step.shape[1:]) for step, shape in _kernels(layout))


def weights(layout: Layout) -> int:
    """Number of weights that the linear layers read, over all limbs; late layers use each at few positions."""
    return sum(_limbs(layout, step) * math.prod(shape) for step, shape in _kernels(layout))


def _kernels(layout: Layout) -> list[tuple[Step, tuple[int, ...]]]:
    shapes = parameter_shapes(layout.program)
    return [(step, shapes[f"{step.name}.weight"]) for step in layout.linear]


def _limbs(layout: Layout, step: Step) -> int:
    """Number of float64 limbs of a ring product, for weights of about 1 / sqrt(terms), as at initialisation."""
    terms = math.prod(parameter_shapes(layout.program)[f"{step.name}.weight"][:-1])
    room = EXACT_BITS - layout.program.fraction_bits - math.ceil(math.log2(terms) / 2)
    return max(1, -(-(layout.program.exact.get(step.name, FIELD_BITS) - 1) // room))


def linear_values(layout: Layout) -> int:
    """Number of values that enter and leave linear layers."""
    inside = sum(math.prod(shape) for shape in layout.masked.values())
    return inside + sum(math.prod(step.shape) for step in layout.linear)
