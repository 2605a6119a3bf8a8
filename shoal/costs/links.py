"""Links between the parties: bandwidth and latency."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """Bits a second in each direction, and seconds there and back."""

    rate: float = math.inf
    rtt_s: float = 0.0


NETWORKS = {"none": Network(), "lan": Network(3e9, 0.3e-3), "wan": Network(400e6, 40e-3)}
"""The two networks of Cheetah's and this project's figures, and one that costs nothing."""
