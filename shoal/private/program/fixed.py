"""Fixed point in Z_2^64: encoding, truncation, and linear layers that are exact modulo 2^64.

A word is the signed 64-bit integer `round(value * 2^fraction_bits)`; arithmetic on words wraps around.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from shoal.errors import ShoalError

if TYPE_CHECKING:
    # Processes that make items read programs but need no PyTorch, whose import takes longer than a second.
    import torch
    from torch import Tensor

    from shoal.private.program.convolution import Team

FIELD_BITS = 64
EXACT_BITS = 53
"""float64 represents every integer up to 2^53, so sums that stay below it are exact in any order."""
PRODUCT_BITS = 42
"""The largest ring of a product that `shoal.private.products` can make."""
WIDE_WEIGHT_BITS = 40
WEIGHT_LIMB_BITS = 16

MOST_BITS, LEAST_BITS = 18, 8
COMFORT_BITS = {1: 12, 2: 12, 3: 14}
"""By softness, the fraction bits that a soft demand must leave: with fewer, precision matters more than keeping
activations under 2^24 (1), signs within 20 bits (2) or products in one limb (3)."""
Words = TypeVar("Words", Any, "Tensor")
"""int64 words: a NumPy array or a torch tensor."""


@dataclass(frozen=True)
class FixedPoint:
    """Numbers as words of Z_2^`field_bits` with `fraction_bits` fraction bits; one unit is 2^-fraction_bits.

    Raises ShoalError for another ring than 64 bits or fraction bits outside 1..30.
    """

    fraction_bits: int
    field_bits: int = FIELD_BITS

    def __post_init__(self) -> None:
        if self.field_bits != FIELD_BITS:
            raise ShoalError(f"found field_bits {self.field_bits!r}; need {FIELD_BITS}; leave it at its default")
        f = self.fraction_bits
        if not isinstance(f, int) or isinstance(f, bool) or not 1 <= f <= 30:
            raise ShoalError(f"found fraction_bits {f!r}; need an integer from 1 to 30; try 16")

    @property
    def scale(self) -> int:
        """The word that stands for 1."""
        return 1 << self.fraction_bits

    def encode(self, values: Any, name: str = "the values") -> np.ndarray:
        """int64 words nearest to `values` (float array or tensor of any shape), ties to even.

        Raises ShoalError, with `name` for the values, for NaN, infinity and numbers too large for the ring.
        """
        scaled = np.rint(_float64(values) * self.scale)
        if not np.isfinite(scaled).all():
            raise ShoalError(f"found NaN or infinity in {name}; need finite numbers; look for diverged training")
        if scaled.size and np.abs(scaled).max() >= 2.0 ** (self.field_bits - 1):
            raise ShoalError(
                f"found magnitude {np.abs(scaled).max() / self.scale:g} in {name}; need less than "
                f"2^{self.field_bits - 1 - self.fraction_bits}; rescale them or use fewer fraction bits"
            )
        return scaled.astype(np.int64)

    def decode(self, words: np.ndarray) -> np.ndarray:
        """float64 values of int64 words, same shape; exact for words below 2^53."""
        return np.asarray(words, dtype=np.int64).astype(np.float64) / self.scale

    def truncate(self, words: Words) -> Words:
        """Words of a product (scale 2^2f) at scale 2^f again, by an arithmetic shift, which rounds down."""
        return words >> self.fraction_bits

    def reciprocal(self, count: int) -> int:
        """The word of 1/count, which turns a sum into a mean. Raises ShoalError when that word is zero."""
        word = round(self.scale / count)
        if not word:
            raise ShoalError(
                f"found an average over {count} values at {self.fraction_bits} fraction bits, where 1/{count} "
                "rounds to zero; need more fraction bits; or pool in two steps"
            )
        return word


def _float64(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


@dataclass(frozen=True)
class Demand:
    """A magnitude that is `value` times 2^(power * f) with f fraction bits and must stay below 2^bits.

    Demands with `softness` 0 must hold. Of the others, those with a higher softness are given up first.
    """

    name: str
    what: str
    value: float
    power: int
    bits: int
    softness: int = 0

    def fits(self, f: int) -> bool:
        """Whether the magnitude stays below the limit with `f` fraction bits."""
        return round(self.value * 2.0 ** (self.power * f)) < 1 << self.bits

    def message(self, f: int) -> str:
        """The error message for a magnitude that does not fit with `f` fraction bits."""
        return (
            f"found {self.what} {self.value:.4g} at {self.name} with {f} fraction bits; need less than "
            f"2^{self.bits - self.power * f} = {2.0 ** (self.bits - self.power * f):.4g}; rescale that layer, "
            "train it with weight decay, or use fewer fraction bits (8 at least) or a smaller margin"
        )


def choose_fraction_bits(demands: list[Demand], given: int | None) -> int:
    """The given fraction bits, or the most that satisfy the hard demands and as many soft ones as possible.

    Raises ShoalError when a hard demand does not fit.
    """
    hard = [d for d in demands if not d.softness]
    if given is None:
        levels = sorted({d.softness for d in demands if d.softness}, reverse=True)
        ladders = [([d for d in demands if d.softness <= s], COMFORT_BITS[s]) for s in levels] + [(hard, LEAST_BITS)]
        fitting = [f for d, least in ladders for f in range(MOST_BITS, least - 1, -1) if all(x.fits(f) for x in d)]
        given = fitting[0] if fitting else LEAST_BITS
    bits = FixedPoint(given).fraction_bits
    misfit = next((d for d in hard if not d.fits(bits)), None)
    if misfit is not None:
        raise ShoalError(misfit.message(bits))
    return bits


class RingProduct:
    """`product(x, weight)` mod 2^64 for int64 operands, exact; `product` takes float64 integers and returns int64.

    Operands are split into limbs so small that every partial sum is exact in float64; the limbs of the weight are
    made once. Dimension 0 of `weight` counts the outputs. Each output is a sum of products of x with weight entries
    that uses every entry at most once. Raises ShoalError for 2^36 weights per output or more.
    """

    def __init__(
        self,
        product: Callable[[Tensor, Tensor], Tensor],
        weight: Tensor,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        self.product = product
        self.parts: list[tuple[int, Tensor, int]] = []
        # Wide weights would leave only a few bits for each limb of x, so they are split first.
        wide = _norm(weight).bit_length() > WIDE_WEIGHT_BITS
        for shift, w in limbs(weight, WEIGHT_LIMB_BITS) if wide else [(0, weight)]:
            norm = _norm(w)
            if norm.bit_length() >= EXACT_BITS:
                raise ShoalError(f"found {w[0].numel()} weights an output; need fewer than 2^36; split the layer")
            doubles = w.double() if memory_format is None else w.double().contiguous(memory_format=memory_format)
            self.parts.append((shift, doubles, norm))

    def __call__(self, x: Tensor, ring_bits: int = FIELD_BITS) -> Tensor:
        """The int64 product with int64 `x`, correct at least modulo 2^`ring_bits`."""
        unused = FIELD_BITS - ring_bits
        if unused:
            x = (x << unused).bitwise_right_shift_(unused)
        top, total = 1 << (ring_bits - 1), None
        if any(top * norm > 2**EXACT_BITS for _, _, norm in self.parts):
            top = peak(x)  # the words may be smaller than their ring
        for weight_shift, w, norm in self.parts:
            for shift, a in limbs(x, EXACT_BITS - norm.bit_length()) if top * norm > 2**EXACT_BITS else [(0, x)]:
                if shift + weight_shift < FIELD_BITS:
                    part = self.product(a.double(), w)
                    part = part << (shift + weight_shift) if shift + weight_shift else part
                    total = part if total is None else total.add_(part)
        assert total is not None  # both operands have at least one limb, at shift zero
        return total


class RingConv2d(RingProduct):
    """Cross-correlation of int64 [N, C, H, W] with `weight` int64 [O, C/groups, kh, kw], mod 2^64, not truncated.

    `attrs` holds stride, padding, dilation (pairs) and groups. `plane`, the number of outputs per channel, chooses the
    faster form; `team` shares the work.
    """

    def __init__(
        self, weight: Tensor, attrs: dict[str, Any], plane: int | None = None, team: Team | None = None
    ) -> None:
        from shoal.private.program.convolution import Convolution

        convolution = Convolution(attrs, plane, team)
        super().__init__(convolution, weight, convolution.format)


class RingLinear(RingProduct):
    """int64 [N, F] times the transpose of `weight` int64 [O, F], mod 2^64, not truncated."""

    def __init__(self, weight: Tensor) -> None:
        import torch.nn.functional as F

        super().__init__(lambda x, w: F.linear(x, w).long(), weight)


def limbs(words: Tensor, bits: int) -> list[tuple[int, Tensor]]:
    """(shift, limb) pairs with sum(limb << shift) == words and abs(limb) <= 2^bits; only the last limb is signed."""
    parts: list[tuple[int, Tensor]] = []
    shift = 0
    while peak(words) > 1 << bits:
        parts.append((shift, words & ((1 << bits) - 1)))
        words, shift = words >> bits, shift + bits
    return [*parts, (shift, words)]


def peak(words: Tensor) -> int:
    """The largest magnitude as a Python integer (2^63 does not fit int64); 0 if empty."""
    return max(abs(int(end)) for end in words.aminmax()) if words.numel() else 0


def _norm(weight: Tensor) -> int:
    """An upper bound of the largest L1 norm of an output's weights, tight below 2^53, where it matters."""
    sums = weight.double().abs().flatten(1).sum(1)
    return int(float(sums.max()) * (1 + 2**-20)) + 1 if sums.numel() else 0
