"""What `shoal cost` and `shoal calibrate` do: forecasts of private inference for any network, before it is compiled."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal import units
from shoal.costs.links import LINKS
from shoal.costs.machine import Machine
from shoal.costs.model import direct_cost, layout_of, prepared_cost
from shoal.costs.protocols import PrivateCost, delphi
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.graph.max_pool import expand_max_pools
from shoal.jobs.inputs import parse_shape
from shoal.networks.assembly import own_network
from shoal.networks.figures import counts
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network
from shoal.progress import say
from shoal.storage.run import Run
from shoal.surgery.tracing import trace

HEAD = ["network", "phase", "seconds", "MB", "one-way latencies"]


def network_of(target: str, size: str, classes: int, width: float, resolution: float) -> Graph:
    """The folded graph of a run's network, or of a zoo's or a user's by name."""
    if Path(target).is_dir():
        spec, model = load_network(Run(Path(target)))
        return fold(trace(model, spec.shape))
    shape = parse_shape(size)
    return fold(trace(own_network(Spec(target, classes, shape, width, resolution)), shape))


def forecast(graph: Graph, machine: Machine | None, batch: int) -> dict[str, Any]:
    """Counts, and for each link direct, offline and online costs, and DELPHI's by its published latencies."""
    if batch < 1:
        raise ShoalError(f"found a batch of {batch}; need 1 or more items")
    total, layout = cost(graph), layout_of(graph)
    rows = {}
    for name, link in LINKS.items():
        prepared = prepared_cost(layout, machine, link, batch)
        phases = {"direct": direct_cost(graph, machine, link), "offline": prepared.offline}
        phases |= {"online": prepared.online, "delphi": delphi(cost(expand_max_pools(graph)))}
        rows[name] = {phase: asdict(spent) for phase, spent in phases.items()}
    disk = prepared_cost(layout).disk_bytes
    return counts(total) | {"disk_bytes": disk, "calibrated": machine is not None, "networks": rows}


def table_rows(body: dict[str, Any]) -> list[list[str]]:
    """The rows under `HEAD`: each network's phases, then DELPHI's as published, which no network changes."""
    rows = []
    for name, phases in body["networks"].items():
        rows += [[name, phase, *_cells(PrivateCost(**phases[phase]))] for phase in ("direct", "offline", "online")]
    published = PrivateCost(**next(iter(body["networks"].values()))["delphi"])
    return [*rows, ["as published", "DELPHI online", *_cells(published)]]


def _cells(spent: PrivateCost) -> list[str]:
    return [units.seconds(spent.seconds), units.megabytes(spent.bytes), units.count(round(2 * spent.rounds))]


def machine_at(path: Path | None) -> Machine | None:
    """The constants at `path`, or None for the defaults."""
    return None if path is None else Machine.load(path)


def calibrate(out: Path) -> dict[str, Any]:
    """Measure this machine and write its constants to `out`."""
    from shoal.measuring.calibration import calibrate as measure

    machine, _ = measure(say)
    machine.save(out)
    return asdict(machine) | {"file": str(out)}
