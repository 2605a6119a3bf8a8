"""Which truncations of a private inference may be local, by the probability that one of them fails.

If each party truncates its uniform share of y alone, the result is wrong by 2^(64-f) units with probability
abs(y) / 2^64. The bounds here divide by 2^63 instead, and take `margin` times the magnitudes that calibration saw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from shoal.errors import ShoalError
from shoal.private.program.fixed import FixedPoint
from shoal.private.program.steps import TRUNCATING, Step

MAX_FAILURE = 2.0**-20
"""Default of the highest probability that a local truncation fails in one inference."""


def failure_chances(
    steps: Iterable[Step],
    parameters: dict[str, np.ndarray],
    masses: dict[str, float],
    fraction_bits: int,
    margin: float,
) -> dict[str, float]:
    """For each truncating step, the probability of a failure in one inference if it is truncated locally.

    `masses` gives, by step, the largest sum of the result's magnitudes in one image. The bias is added after
    truncation, so its magnitude is added to theirs.
    """
    chances = {}
    for step in (s for s in steps if s.op in TRUNCATING):
        bias = np.abs(parameters.get(f"{step.name}.bias", np.zeros(1))).sum() * math.prod(step.shape[1:])
        chances[step.name] = margin * (masses[step.name] + float(bias)) * 2.0 ** (2 * fraction_bits - 63)
    return chances


def exact_steps(chances: dict[str, float], max_failure: float, free: Iterable[str] = ()) -> tuple[set[str], float]:
    """Steps to truncate exactly so that the chances of all others sum to at most `max_failure`; and that sum.

    All `free` steps are among them, and as few others as necessary. Raises ShoalError unless `max_failure` is in
    [0, 1].
    """
    if not 0 <= max_failure <= 1:
        raise ShoalError(f"found max_failure {max_failure}; need a probability; try 2^-20 = {MAX_FAILURE:.1e}")
    exact = set(free)
    for name in sorted(chances.keys() - exact, key=lambda name: -chances[name]):
        if sum(c for n, c in chances.items() if n not in exact) <= max_failure:
            break
        exact.add(name)
    return exact, sum(c for n, c in chances.items() if n not in exact)


def ring_bits(product: float, fixed: FixedPoint) -> int:
    """The smallest m for which products up to `product` stay below 2^(m-2) at scale 2^2f, including rounding."""
    return (int(product * fixed.scale**2) + (fixed.scale << 4)).bit_length() + 2


def sign_bits(magnitude: float, fixed: FixedPoint) -> int:
    """The smallest m for which values up to `magnitude` stay below 2^m units, including a unit of rounding."""
    return (int(magnitude * fixed.scale) + 2).bit_length()
