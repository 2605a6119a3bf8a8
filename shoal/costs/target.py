"""What a private inference may take, and what a network's inference is forecast to take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shoal.costs.links import LINKS
from shoal.costs.machine import Machine
from shoal.costs.model import direct_cost, layout_of, prepared_cost
from shoal.costs.protocols import PrivateCost
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.graph import Graph

MODES = ("online", "offline", "total", "direct")
UNITS = {"ms": ("s", 1e-3), "s": ("s", 1.0), "kb": ("bytes", 1e3), "mb": ("bytes", 1e6), "gb": ("bytes", 1e9)}
UNITS |= {"relus": ("relus", 1.0), "krelus": ("relus", 1e3)}


@dataclass(frozen=True)
class Forecast:
    """One network's counts, and what one phase of its private inference takes: seconds, bytes, one-way latencies."""

    relus: int
    macs: int
    depth: int
    relu_layers: int
    seconds: float
    bytes: int
    latencies: float


@dataclass(frozen=True)
class Target:
    """The most that one private inference may take: `limit` of `unit` (s, bytes or relus) in `mode` over `link`.

    `link` is one of `LINKS`. `mode` is online or offline, total for both one after the other, or direct for everything
    inside SPU.
    """

    limit: float
    unit: str
    mode: str = "online"
    link: str = "none"

    @classmethod
    def parse(cls, text: str, mode: str = "online", link: str = "none") -> Target:
        """The target of text like 0.5s, 120ms, 80MB or 50krelus. Raises ShoalError for anything else."""
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]+)\s*", text.lower())
        if found is None or found.group(2) not in UNITS or not float(found.group(1)) > 0:
            raise ShoalError(f"found target {text!r}; need a number above 0 and a unit, such as 0.5s, 80MB or 50krelus")
        for name, value, known in (("mode", mode, MODES), ("link", link, tuple(LINKS))):
            if value not in known:
                raise ShoalError(f"found {name} {value!r}; need one of {', '.join(known)}")
        unit, scale = UNITS[found.group(2)]
        return cls(float(found.group(1)) * scale, unit, mode, link)

    def as_json(self) -> dict[str, Any]:
        """The target as it is written in plans and summaries, where the link has the key ``network``."""
        body = asdict(self)
        return body | {"network": body.pop("link")}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Target:
        """The target that `as_json` gave. Raises ValueError for other keys."""
        if odd := body.keys() ^ {"limit", "unit", "mode", "network"}:
            raise ValueError(f"Target with {sorted(odd)}")
        return cls(body["limit"], body["unit"], body["mode"], body["network"])

    def taken(self, forecast: Forecast) -> float:
        """What `forecast` takes of what the limit is on."""
        return float({"s": forecast.seconds, "bytes": forecast.bytes, "relus": forecast.relus}[self.unit])

    def amount(self, value: float) -> str:
        """`value` in the target's unit, for people."""
        if self.unit == "bytes":
            return f"{value / 1e6:.3g} MB"
        return f"{value:,.0f} ReLUs" if self.unit == "relus" else f"{value:.3g} s"

    def __str__(self) -> str:
        return f"{self.amount(self.limit)} {self.mode}" + (f" over {self.link}" if self.link != "none" else "")

    def forecast(self, graph: Graph, machine: Machine | None = None) -> Forecast:
        """What one inference of a folded graph takes in the target's mode over its link.

        Raises ShoalError, naming the node, for operations without a private form.
        """
        total = cost(graph)
        spent = _spent(graph, self.mode, machine or Machine(), self.link)
        counts = (total.relus, total.macs, total.depth, total.relu_layers)
        return Forecast(*counts, spent.seconds, spent.bytes, 2 * spent.rounds)


def _spent(graph: Graph, mode: str, machine: Machine, link: str) -> PrivateCost:
    if mode == "direct":
        return direct_cost(graph, machine, LINKS[link])
    both = prepared_cost(layout_of(graph), machine, LINKS[link])
    if mode != "total":
        return both.online if mode == "online" else both.offline
    a, b = both.offline, both.online
    return PrivateCost(a.seconds + b.seconds, a.bytes + b.bytes, a.rounds + b.rounds)
