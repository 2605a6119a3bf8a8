"""Links between the two machines: bandwidth and latency."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A connection between the two machines: bits per second in each direction, and the round-trip time in seconds."""

    rate: float = math.inf
    rtt_s: float = 0.0


LINKS = {"none": Link(), "lan": Link(3e9, 0.3e-3), "wan": Link(400e6, 40e-3)}
"""Links by name: the LAN and WAN of Cheetah's and this project's measurements, and one without any cost."""
