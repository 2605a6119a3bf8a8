"""Parameters of the products of SEAL: which steps it multiplies, and how far an answer's noise hides the weights.

`compile` decides them and states them in the program, so both parties compare them before they start. This needs no
SEAL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import ShoalError
from shoal.private.products.packing import Convolution, Packing, pack

if TYPE_CHECKING:
    # Importing programs takes seconds, because it imports torch; workers only need the constants.
    from shoal.private.program.program import Program, Weights

DEGREE = 8192
PRIME_BITS = (60, 60, 60)
"""Two primes of ciphertexts and the special prime of keys; together 180 of the 218 bits that are 128-bit secure."""
STATISTICAL = 40
"""Bits by which the flooding error exceeds the noise of products."""
ERROR = 22
"""Bound of one coefficient of a fresh error (SEAL's centred binomial, at most 21), with rounding of the message."""
MOST_PLAIN_BITS = 42
MOST_FLOOD_BITS = 90
"""More would not fit into the words that `Evaluator.flood` computes with."""


def flood_bits(plain_bits: int) -> int:
    """Bits of the flooding error for t = 2^`plain_bits`: the most that decryption allows, whatever the weights are.

    q / 2t is 2^(119 - plain_bits). The error takes at most an eighth of it, the noise of products far less, so a
    decryption never fails. After the switch to one prime p, an eighth of p / 2t is 2^(56 - plain_bits) and the rounding
    of the switch at most 2^13 (a ternary key), so plain_bits is at most MOST_PLAIN_BITS.
    """
    return min(sum(PRIME_BITS[:2]) - plain_bits - 4, MOST_FLOOD_BITS)


def noise_bits(weights: np.ndarray, together: int) -> int:
    """Bits of the worst noise of an answer with `together` outputs, for weights int64 [outputs, ...].

    A coefficient of the noise is a sum of fresh errors times the coefficients of the weight polynomials, and so at most
    ERROR times the sum of the magnitudes of all weights of these outputs.
    """
    sums = np.abs(weights.reshape(len(weights), -1)).sum(1)
    most = np.pad(sums, (0, -len(sums) % together)).reshape(-1, together).sum(1).max(initial=0)
    return int(ERROR * max(int(most), 1)).bit_length()


def margin_bits(weights: np.ndarray, packing: Packing, plain_bits: int) -> int:
    """Bits by which the flooding error exceeds the worst noise of a step's answers."""
    return flood_bits(plain_bits) - noise_bits(weights, packing.co)


def choose(program: Program, weights: Weights) -> dict[str, Any]:
    """`Program.products`: the parameters, and the steps that SEAL multiplies.

    These are all steps that are truncated exactly in a ring of at most MOST_PLAIN_BITS, whose kernel fits into a
    polynomial, and whose margin is at least STATISTICAL. SPU multiplies the others. Empty if there is none.
    """
    chosen = fitting(program)
    while chosen:
        bits = max(program.exact[name] for name in chosen)
        margins = {name: margin_bits(weights.arrays[f"{name}.weight"], p, bits) for name, p in chosen.items()}
        if min(margins.values()) >= STATISTICAL:
            return _stated(bits) | {"steps": list(chosen)}
        # Without the step of the least margin the ring of the others may be smaller, and so their margin larger.
        chosen = {name: p for name, p in chosen.items() if name != min(margins, key=margins.__getitem__)}
    return {}


def fitting(program: Program) -> dict[str, Packing]:
    """The packing of each step that is truncated exactly in a ring of at most MOST_PLAIN_BITS."""
    return _packed(program, [name for name, bits in program.exact.items() if bits <= MOST_PLAIN_BITS])


def _stated(plain_bits: int) -> dict[str, Any]:
    return {
        "degree": DEGREE,
        "prime_bits": list(PRIME_BITS),
        "plain_bits": plain_bits,
        "flood_bits": flood_bits(plain_bits),
    }


def packings(program: Program) -> dict[str, Packing]:
    """The packing of each step that SEAL multiplies. Raises ShoalError for parameters that this version cannot use."""
    given = program.products
    if not given:
        return {}
    bits = given.get("plain_bits")
    if (
        not isinstance(bits, int)
        or not 2 <= bits <= MOST_PLAIN_BITS
        or given != _stated(bits) | {"steps": given.get("steps")}
    ):
        raise ShoalError(f"found parameters {given} of products; need those of this version of shoal; compile again")
    found = _packed(program, given["steps"])
    if set(found) != set(given["steps"]):
        raise ShoalError(f"found products of {given['steps']}; need convolutions and linear layers; compile again")
    return found


def _packed(program: Program, names: list[str]) -> dict[str, Packing]:
    """Packings of those of `names` that have one, in the order of the steps."""
    shapes = {program.input: program.input_shape} | {step.name: step.shape for step in program.steps}
    found = {}
    for step in program.steps:
        if step.name in names and step.op in ("conv2d", "linear"):
            conv = Convolution.of(step, shapes[step.inputs[0]])
            if np.prod(conv.extent) <= DEGREE:
                found[step.name] = pack(conv, DEGREE)
    return found


def least_margin(program: Program, weights: Weights) -> int | None:
    """The least margin of all steps that SEAL multiplies, in bits; None if there is none."""
    found = packings(program).items()
    bits = program.products.get("plain_bits", 0)
    return min((margin_bits(weights.arrays[f"{name}.weight"], p, bits) for name, p in found), default=None)
