"""The jobs of `shoal cost` and `shoal calibrate`: forecast a private inference before the network is compiled."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from shoal import units
from shoal.costs.links import LINKS
from shoal.costs.machine import Machine
from shoal.costs.model import layout_of, prepared_cost
from shoal.costs.protocols import PrivateCost, delphi
from shoal.errors import ShoalError, ShoalWarning
from shoal.graph.counting import cost
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.graph.max_pool import expand_max_pools
from shoal.jobs.options import Subject
from shoal.networks.assembly import own_network
from shoal.networks.figures import counts
from shoal.networks.stored import load_network
from shoal.progress import timeline
from shoal.storage.summary import Counts
from shoal.surgery.tracing import check_trace, trace

HEAD = ["link", "phase", "seconds", "MB", "one-way latencies"]
PHASES = {"offline": "offline, an item", "online": "online, a query"}
"""The phases of a private inference by name, as tables show them."""


@dataclass(frozen=True)
class Request(Subject):
    """The options of `shoal cost`."""

    machine: Path | None = None
    """JSON file from shoal calibrate with the measured speed of a machine. If left out: the speed of two cores that
    both parties share."""
    batch: int = 1
    """Number of items that are prepared together; offline figures are per item."""

    def graph(self) -> Graph:
        """The network's graph after folding. Raises ShoalError for a network that cannot be built or traced."""
        if self.run is not None:
            spec, model = load_network(self.run)
            return fold(trace(model, spec.shape))
        spec = self.spec()
        return fold(check_trace(own_network(spec), spec.shape))


class Spent(TypedDict):
    """The cost of one phase of a private inference; the fields are those of `PrivateCost`."""

    seconds: float
    bytes: int
    rounds: float


class Forecasts(Counts):
    """Counts of a network, and the cost of each phase over each link."""

    disk_bytes: int
    calibrated: bool
    networks: dict[str, dict[str, Spent]]


def forecast(request: Request) -> Forecasts:
    """Count a network, and forecast the cost of both phases over each link, and DELPHI's online phase as published.

    Raises ShoalError for a batch below 1, and as `Request.graph` does.
    """
    if request.batch < 1:
        raise ShoalError(f"found a batch of {request.batch}; need 1 or more items")
    graph, machine = request.graph(), machine_at(request.machine)
    layout, garbled = layout_of(graph), delphi(cost(expand_max_pools(graph)))
    rows = {}
    for name, link in LINKS.items():
        prepared = prepared_cost(layout, machine, link, request.batch)
        phases = {"offline": prepared.offline, "online": prepared.online, "delphi": garbled}
        rows[name] = {
            phase: Spent(seconds=own.seconds, bytes=own.bytes, rounds=own.rounds) for phase, own in phases.items()
        }
    return Forecasts(
        **counts(cost(graph)),
        disk_bytes=prepared_cost(layout).disk_bytes,
        calibrated=machine is not None,
        networks=rows,
    )


def table_rows(body: Forecasts) -> list[list[str]]:
    """Rows under `HEAD`: the phases over each link, then DELPHI's published online phase, the same for every link."""
    rows = []
    for name, phases in body["networks"].items():
        rows += [[name, shown, *_cells(PrivateCost(**phases[phase]))] for phase, shown in PHASES.items()]
    published = PrivateCost(**next(iter(body["networks"].values()))["delphi"])
    return [*rows, ["as published", "DELPHI online", *_cells(published)]]


def _cells(spent: PrivateCost) -> list[str]:
    return [units.seconds(spent.seconds), units.megabytes(spent.bytes), units.count(round(2 * spent.rounds))]


def machine_at(path: Path | None) -> Machine | None:
    """The constants in the file `path`; None, for the defaults, without a path."""
    return None if path is None else Machine.load(path)


@dataclass(frozen=True)
class Calibration:
    """The options of `shoal calibrate`."""

    out: Path = Path("machine.json")
    """JSON file to write the results to, for --machine of shoal cost, plan and report."""


def calibrate(wanted: Calibration) -> dict[str, object]:
    """Measure the constants of this machine, write them to a JSON file, and return them.

    The result also has the largest spread of the measurements, and the load average. Warns if the machine is busy.
    """
    from shoal.measuring.calibration import STEPS
    from shoal.measuring.calibration import calibrate as measure
    from shoal.measuring.repeats import busy

    with timeline(STEPS) as begin:
        machine, found = measure(begin)
    machine.save(wanted.out)
    spreads = found["spreads"]
    if (sentence := busy(spreads)) is not None:
        warnings.warn(sentence, ShoalWarning, stacklevel=2)
    facts = {"spread": max(spreads.values()), "load": os.getloadavg()[0], "file": str(wanted.out)}
    return asdict(machine) | facts
