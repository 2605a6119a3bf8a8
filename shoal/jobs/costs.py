"""What `shoal cost` and `shoal calibrate` do: forecasts of private inference for any network, before it is compiled."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from shoal.storage.run import Run
from shoal.surgery.tracing import trace

HEAD = ["", "direct s", "MB", "offline s", "MB", "online s", "MB", "waits", "DELPHI s"]


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
    """The rows under `HEAD`."""
    rows = []
    for name, phases in body["networks"].items():
        direct, offline, online, gc = (PrivateCost(**phases[p]) for p in ("direct", "offline", "online", "delphi"))
        row = [name]
        for spent, form in ((direct, ".2f"), (offline, ".2f"), (online, ".4f")):
            row += [f"{spent.seconds:{form}}", f"{spent.bytes / 1e6:.1f}"]
        rows.append([*row, f"{2 * online.rounds:.0f}", f"{gc.seconds:.2f}"])
    return rows


def machine_at(path: Path | None) -> Machine | None:
    """The constants at `path`, or None for the defaults."""
    return None if path is None else Machine.load(path)


def calibrate(out: Path) -> dict[str, Any]:
    """Measure this machine and write its constants to `out`."""
    from rich.console import Console

    from shoal.measuring.calibration import calibrate as measure

    machine, _ = measure(lambda text: Console(stderr=True).print(text, highlight=False))
    machine.save(out)
    return asdict(machine) | {"file": str(out)}
