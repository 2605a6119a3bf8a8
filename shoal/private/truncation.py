"""Where a local truncation may stand in a private inference, by the probability that one of them fails.

For shares of y, uniform but for their sum, truncating each alone is wrong by 2^(64-f) units with probability
abs(y) / 2^64; the bound here takes 2^63, and `margin` times the magnitudes that calibration saw.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from shoal.errors import ShoalError
from shoal.private.clear import TRUNCATING, Step
from shoal.private.fixed import FixedPoint

MAX_FAILURE = 2.0**-20


def failure_chances(
    steps: Iterable[Step],
    parameters: dict[str, np.ndarray],
    masses: dict[str, float],
    fraction_bits: int,
    margin: float,
) -> dict[str, float]:
    """The chance of a failure in each truncating step of one inference, were it truncated locally.

    `masses` holds the largest sum of magnitudes of a step's result over one image. What is truncated has no bias yet.
    """
    chances = {}
    for step in (s for s in steps if s.op in TRUNCATING):
        bias = np.abs(parameters.get(f"{step.name}.bias", np.zeros(1))).sum() * math.prod(step.shape[1:])
        chances[step.name] = margin * (masses[step.name] + float(bias)) * 2.0 ** (2 * fraction_bits - 63)
    return chances


def exact_steps(chances: dict[str, float], max_failure: float) -> tuple[tuple[str, ...], float]:
    """The fewest steps to truncate exactly so that the others' chances sum to `max_failure` at most, and that sum.

    Raises ShoalError unless `max_failure` lies in [0, 1].
    """
    if not 0 <= max_failure <= 1:
        raise ShoalError(f"found max_failure {max_failure}; need a probability; try 2^-20 = {MAX_FAILURE:.1e}")
    exact: list[str] = []
    for name in sorted(chances, key=lambda name: -chances[name]):
        left = sum(c for n, c in chances.items() if n not in exact)
        if left <= max_failure:
            break
        exact.append(name)
    return tuple(n for n in chances if n in exact), sum(c for n, c in chances.items() if n not in exact)


def sign_bits(magnitude: float, fixed: FixedPoint) -> int:
    """The bits m for which values up to `magnitude` stay below 2^m units, a unit of rounding included."""
    return (int(magnitude * fixed.scale) + 2).bit_length()
