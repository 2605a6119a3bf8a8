"""A target for the cost of private inference, and the forecast for a network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shoal.costs.links import LINKS
from shoal.costs.machine import Machine
from shoal.costs.model import layout_of, prepared_cost
from shoal.costs.protocols import PrivateCost
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.graph import Graph

MODES = ("online", "offline", "total")
UNITS = {"ms": ("s", 1e-3), "s": ("s", 1.0), "kb": ("bytes", 1e3), "mb": ("bytes", 1e6), "gb": ("bytes", 1e9)}
UNITS |= {"relus": ("relus", 1.0), "krelus": ("relus", 1e3)}


@dataclass(frozen=True)
class Forecast:
    """Counts of a network, and the seconds, bytes and one-way latencies of one private inference in one mode."""

    relus: int
    macs: int
    depth: int
    relu_layers: int
    seconds: float
    bytes: int
    latencies: float


@dataclass(frozen=True)
class Target:
    """The upper limit for one private inference: `limit` in `unit` (s, bytes or relus), in `mode` over `link`.

    `link` is one of `LINKS`. `mode` is the phase: ``online``, ``offline``, or ``total`` for both in succession.
    """

    limit: float
    unit: str
    mode: str = "online"
    link: str = "none"

    @classmethod
    def parse(cls, text: str, mode: str = "online", link: str = "none") -> Target:
        """The target given by a text such as 0.5s, 120ms, 80MB or 50krelus.

        Raises ShoalError for any other text, and for an unknown mode or link.
        """
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]+)\s*", text.lower())
        if found is None or found.group(2) not in UNITS or not float(found.group(1)) > 0:
            raise ShoalError(f"found target {text!r}; need a number above 0 and a unit, such as 0.5s, 80MB or 50krelus")
        for name, value, known in (("mode", mode, MODES), ("link", link, tuple(LINKS))):
            if value not in known:
                raise ShoalError(f"found {name} {value!r}; need one of {', '.join(known)}")
        unit, scale = UNITS[found.group(2)]
        return cls(float(found.group(1)) * scale, unit, mode, link)

    def as_json(self) -> dict[str, Any]:
        """The target as JSON values for plans and summaries, where the link has the key ``network``."""
        body = asdict(self)
        return body | {"network": body.pop("link")}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Target:
        """The target from the result of `as_json`. Raises ValueError for other keys, and for an unknown mode."""
        if odd := body.keys() ^ {"limit", "unit", "mode", "network"}:
            raise ValueError(f"Target with {sorted(odd)}")
        if body["mode"] not in MODES:
            raise ValueError(f"Target in mode {body['mode']!r}")
        return cls(body["limit"], body["unit"], body["mode"], body["network"])

    def taken(self, forecast: Forecast) -> float:
        """The amount that `forecast` needs, in the target's unit."""
        return float({"s": forecast.seconds, "bytes": forecast.bytes, "relus": forecast.relus}[self.unit])

    def amount(self, value: float) -> str:
        """Text for `value`, which is in the target's unit: bytes are shown as MB."""
        if self.unit == "bytes":
            return f"{value / 1e6:.3g} MB"
        return f"{value:,.0f} ReLUs" if self.unit == "relus" else f"{value:.3g} s"

    def __str__(self) -> str:
        return f"{self.amount(self.limit)} {self.mode}" + (f" over {self.link}" if self.link != "none" else "")

    def forecast(self, graph: Graph, machine: Machine | None = None) -> Forecast:
        """The forecast for one inference of a folded graph, in the target's mode over its link.

        Raises ShoalError, naming the node, for operations without a private form.
        """
        total = cost(graph)
        spent = _spent(graph, self.mode, machine or Machine(), self.link)
        counts = (total.relus, total.macs, total.depth, total.relu_layers)
        return Forecast(*counts, spent.seconds, spent.bytes, 2 * spent.rounds)


def _spent(graph: Graph, mode: str, machine: Machine, link: str) -> PrivateCost:
    both = prepared_cost(layout_of(graph), machine, LINKS[link])
    if mode != "total":
        return both.online if mode == "online" else both.offline
    a, b = both.offline, both.online
    return PrivateCost(a.seconds + b.seconds, a.bytes + b.bytes, a.rounds + b.rounds)
