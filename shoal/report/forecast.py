"""The online phase of a run's two networks: measured by the run, or forecast by the cost model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.costs.links import LINKS
from shoal.errors import ShoalError
from shoal.graph.folding import fold
from shoal.networks.stored import load_network
from shoal.report.record import SIDES, Record, look_up
from shoal.storage.run import Run
from shoal.storage.summary import FILE
from shoal.surgery.tracing import trace

if TYPE_CHECKING:
    from shoal.costs.machine import Machine
    from shoal.private.protocol.layout import Layout

NETWORK_FILES = {"baseline": "teacher", "reduced": "model"}
"""The name under which a run of `reduce` stores the network of each side."""


@dataclass(frozen=True)
class Online:
    """The online phase of one prepared inference: one-way latencies in sequence, measured and forecast seconds.

    If there is no forecast, `why` gives the reason.
    """

    waits: int | None = None
    measured_s: float | None = None
    forecast_s: float | None = None
    why: str = ""

    @property
    def seconds(self) -> float | None:
        """The measured seconds, or the forecast if there are none."""
        return self.forecast_s if self.measured_s is None else self.measured_s

    def as_kind(self, measured: bool) -> float | None:
        """The measured or the forecast seconds."""
        return self.measured_s if measured else self.forecast_s


def check_network_name(name: str) -> None:
    """Raise ShoalError unless `name` is one of `LINKS`."""
    if name not in LINKS:
        raise ShoalError(f"found link {name!r}; need one of {', '.join(LINKS)}")


def online(record: Record, link: str, machine: Machine | None) -> dict[str, Online]:
    """The online phase of each network of a run over `link`, one of `LINKS`, forecast with the constants of `machine`.

    None means default constants. Runs measure over TLS on loopback, so other links have only forecasts. There is no
    forecast for a network that is not stored with its run or cannot be compiled for private inference; `why` gives the
    reason. Raises ShoalError for an unknown link.
    """
    check_network_name(link)
    return {side: _online(record, side, link, machine) for side in record.sides}


def _online(record: Record, side: str, link: str, machine: Machine | None) -> Online:
    from shoal.costs.model import prepared_cost

    measured = look_up(record.summary.side(side), "prepared.online_s") if link == "none" else None
    try:
        layout = _layout(record.folder, side)
        spent = prepared_cost(layout, machine, LINKS[link]).online
    except ShoalError as error:
        return Online(measured_s=measured, why=f"{side}: {error}")
    return Online(layout.online.latencies, measured, spent.seconds)


def _layout(folder: Path, side: str) -> Layout:
    """The layout of the run's compiled program; without one, that of the stored network with assumed fraction bits."""
    from shoal.costs.model import layout_of
    from shoal.private.program.program import Program
    from shoal.private.protocol.layout import Layout

    client = folder / side / "client"
    if client.is_dir():
        return Layout(Program.load(client))
    run = Run(folder)
    name = NETWORK_FILES[side] if run.has(FILE) else "model"  # a run of one network has only that
    spec, model = load_network(run, name)
    return layout_of(fold(trace(model, spec.shape)))


def flat_online(found: Mapping[str, Online]) -> dict[str, float | None]:
    """The forecasts as columns of a run's flat row; empty when `found` is empty."""
    row: dict[str, float | None] = {}
    for side in SIDES if found else ():
        phase = found.get(side, Online())
        row |= {f"{side}.waits": phase.waits, f"{side}.online_forecast_s": phase.forecast_s}
    return row
