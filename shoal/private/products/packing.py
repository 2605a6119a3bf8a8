"""How a convolution becomes products of polynomials: coefficient packing of input and output channels.

Products are taken in Z_t[X] / (X^N + 1). A polynomial of the input holds `ci` channels of one padded plane of
P = h w values; a polynomial of the weights holds `co` outputs for these channels. With B = ci P, the extent
K = (kh - 1) dh w + (kw - 1) dw of the (dilated) kernel, and top = (ci - 1) P + K:

    x(X) = sum over c, i, j      x[c, i, j]      X^(c P + i w + j)
    w(X) = sum over m, c, a, b   w[m, c, a, b]   X^(top + m B - c P - a dh w - b dw)

**The coefficient of X^(top + m B + s i w + s j) in x(X) w(X) is y[m, i, j]**, the convolution with stride s, if
co B <= N. Proof. Let p = s i w + s j; the window of (i, j) lies inside the plane, so p + K <= P - 1.

1. Output m, channel c of the weights, channel c' of the input: the exponent is top + m B + (c' - c) P + u - v, with u
   the position of the input value (0 <= u < P) and v = a dh w + b dw (0 <= v <= K). It is read at p only if
   u - v = p + (c - c') P. As -K <= u - v <= P - 1, and 0 <= p <= P - 1 - K: p + P > P - 1, and p - P < -K, so c = c'.
2. Within a channel, u - v = p means (i' - a dh) w + (j' - b dw) = s i w + s j. As j' - b dw lies between
   -(kw - 1) dw and w - 1, and s j between 0 and w - 1 - (kw - 1) dw, both columns are equal, and so both rows: these
   are exactly the terms of the convolution.
3. The terms of output m lie between m B and m B + top + B - 1, and output m is read between m B + top and
   m B + B - 1. So terms of output m - 1 end before m's first read position, and terms of m + 1 begin after the last.
4. An exponent of N or more wraps to exponents below top (at most (co - 1) B + top + B - 1 - N <= top - 1), and the
   first read position is top. So no wrapped term is read.

Sums over more than `ci` channels are sums of such products. Grouped and depthwise convolutions are those of the
block-diagonal weights; a pair of blocks without any common group is left out. Planes above N are cut into tiles of
outputs whose inputs overlap. With a 1x1 kernel and a stride, only the values that are read are packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import ShoalError

if TYPE_CHECKING:
    # Importing steps takes seconds, because it imports torch; workers only need polynomials.
    from shoal.private.program.steps import Shape, Step

Pair = tuple[int, int]


@dataclass(frozen=True)
class Convolution:
    """A convolution of `channels` x `height` x `width` values to `outputs` channels; a linear layer is 1x1 on 1x1."""

    channels: int
    height: int
    width: int
    outputs: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, step: Step, shape: Shape) -> Convolution:
        """That of a conv2d or linear step whose input has `shape`. A convolution must state its kernel's size."""
        if step.op == "linear":
            return cls(prod(shape), 1, 1, step.shape[0])
        a: dict[str, Any] = step.attrs
        if "kernel" not in a:
            raise ShoalError(f"found a convolution without its kernel's size at {step.name}; need it; compile again")
        channels, height, width = shape
        names = ("kernel", "stride", "padding", "dilation")
        kernel, stride, padding, dilation = ((int(a[name][0]), int(a[name][1])) for name in names)
        return cls(channels, height, width, step.shape[0], kernel, stride, padding, dilation, a["groups"])

    @property
    def extent(self) -> Pair:
        """Rows and columns that one output reads from."""
        (kh, kw), (dh, dw) = self.kernel, self.dilation
        return (kh - 1) * dh + 1, (kw - 1) * dw + 1

    @property
    def result(self) -> Pair:
        """Rows and columns of the result."""
        sizes = zip((self.height, self.width), self.padding, self.extent, self.stride, strict=True)
        rows, columns = ((size + 2 * pad - extent) // stride + 1 for size, pad, extent, stride in sizes)
        return rows, columns

    @property
    def step(self) -> Pair:
        """Strides within a packed plane: 1 if the kernel reads single values, because only these are packed."""
        return (1, 1) if self.kernel == (1, 1) else self.stride


@dataclass(frozen=True)
class Packing:
    """The packing of `conv`: channels and outputs for each polynomial of `degree` coefficients, and rows and columns
    of outputs for each tile."""

    conv: Convolution
    degree: int
    ci: int
    co: int
    tile: Pair

    @cached_property
    def plane(self) -> Pair:
        """Rows and columns of a packed plane."""
        sides = zip(self.tile, self.conv.step, self.conv.extent, strict=True)
        rows, columns = ((count - 1) * step + extent for count, step, extent in sides)
        return rows, columns

    @property
    def size(self) -> int:
        """P, the values of a packed plane."""
        return prod(self.plane)

    @property
    def top(self) -> int:
        """Lowest coefficient that is read."""
        (rows, columns), width = self.conv.extent, self.plane[1]
        return (self.ci - 1) * self.size + (rows - 1) * width + columns - 1

    @cached_property
    def tiles(self) -> tuple[Pair, ...]:
        """First row and column of every tile, in outputs."""
        rows, columns = self.conv.result
        return tuple((r, c) for r in range(0, rows, self.tile[0]) for c in range(0, columns, self.tile[1]))

    @property
    def inputs(self) -> int:
        """Polynomials of the input in one tile."""
        return ceil(self.conv.channels / self.ci)

    @property
    def answers(self) -> int:
        """Polynomials of the result in one tile."""
        return ceil(self.conv.outputs / self.co)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """(answer, input) of every polynomial of weights that a group needs, in order of the answers."""
        return tuple((o, i) for o in range(self.answers) for i in range(self.inputs) if self._common(o, i))

    @cached_property
    def among(self) -> frozenset[Pair]:
        """The same pairs, to look one up."""
        return frozenset(self.pairs)

    def _common(self, answer: int, index: int) -> bool:
        per_in, per_out = self.conv.channels // self.conv.groups, self.conv.outputs // self.conv.groups
        first, last = answer * self.co // per_out, (min((answer + 1) * self.co, self.conv.outputs) - 1) // per_out
        low, high = index * self.ci // per_in, (min((index + 1) * self.ci, self.conv.channels) - 1) // per_in
        return max(first, low) <= min(last, high)

    @property
    def weights(self) -> int:
        """Polynomials of weights."""
        return self.answers * self.inputs if self.conv.groups == 1 else len(self.pairs)

    @property
    def products(self) -> int:
        """Products of polynomials for one inference."""
        return self.weights * self.count

    @property
    def count(self) -> int:
        """Number of tiles."""
        return prod(ceil(size / side) for size, side in zip(self.conv.result, self.tile, strict=True))

    # ---- values to polynomials and back

    def input_polynomials(self, values: np.ndarray) -> np.ndarray:
        """uint64 [tiles, inputs, degree] of `values` uint64 [C, H, W] (or [F] for a linear layer)."""
        conv, (h, w) = self.conv, self.plane
        planes = self._padded(values.reshape(conv.channels, conv.height, conv.width))
        out = np.zeros((len(self.tiles), self.inputs, self.degree), np.uint64)
        for at, (row, column) in enumerate(self.tiles):
            y, x = row * conv.step[0], column * conv.step[1]
            part = planes[:, y : y + h, x : x + w].reshape(self.inputs, self.ci * self.size)
            out[at, :, : self.ci * self.size] = part
        return out

    def _padded(self, values: np.ndarray) -> np.ndarray:
        """[inputs * ci, rows, columns]: zero padding, and zeros up to whole blocks and tiles."""
        conv, (down, right) = self.conv, self.conv.padding
        values = np.pad(values, ((0, 0), (down, down), (right, right)))
        if conv.step != conv.stride:
            values = values[:, :: conv.stride[0], :: conv.stride[1]]
        ends = zip(self.tiles[-1], conv.step, self.plane, strict=True)
        rows, columns = (first * step + side for first, step, side in ends)
        out = np.zeros((self.inputs * self.ci, rows, columns), np.uint64)
        kept = values[:, :rows, :columns]
        out[: len(kept), : kept.shape[1], : kept.shape[2]] = kept
        return out

    @cached_property
    def _weight_positions(self) -> np.ndarray:
        """Coefficients [co, ci, kh, kw] of the weights."""
        (kh, kw), (dh, dw) = self.conv.kernel, self.conv.dilation
        m, c, a, b = np.ogrid[: self.co, : self.ci, :kh, :kw]
        at: np.ndarray = self.top + m * self.ci * self.size - c * self.size - a * dh * self.plane[1] - b * dw
        return at

    def needed(self, answers: Iterable[int]) -> tuple[int, ...]:
        """The inputs, in order, of which any of `answers` is computed."""
        wanted = set(answers)
        return tuple(sorted({index for answer, index in self.pairs if answer in wanted}))

    def rows(self, weights: np.ndarray, answer: int) -> np.ndarray:
        """The part of `weights` int64 [O, C/groups, kh, kw] (or [O, F]) of which `answer` is computed."""
        first = answer * self.co
        return weights.reshape(self.conv.outputs, -1, *self.conv.kernel)[first : first + self.co]

    def weight_polynomial(self, rows: np.ndarray, answer: int, index: int) -> np.ndarray:
        """int64 [degree] of the pair (`answer`, `index`), with `rows` of that answer."""
        block = self._block(rows, answer * self.co, index * self.ci)
        out = np.zeros(self.degree, np.int64)
        out[self._weight_positions[: block.shape[0], : block.shape[1]]] = block
        return out

    def _block(self, rows: np.ndarray, first: int, low: int) -> np.ndarray:
        """Weights of outputs from `first` for channels from `low`, of the block-diagonal matrix of all groups."""
        conv, high = self.conv, min(low + self.ci, self.conv.channels)
        if conv.groups == 1:
            return rows[:, low:high]
        per_in, per_out = conv.channels // conv.groups, conv.outputs // conv.groups
        block = np.zeros((len(rows), high - low, *conv.kernel), np.int64)
        for m, row in enumerate(rows):
            begin = (first + m) // per_out * per_in
            start, end = max(begin, low), min(begin + per_in, high)
            if start < end:
                block[m, start - low : end - low] = row[start - begin : end - begin]
        return block

    @cached_property
    def positions(self) -> np.ndarray:
        """Coefficients [co, rows, columns] of an answer that are read."""
        (s, r), width = self.conv.step, self.plane[1]
        m, i, j = np.ogrid[: self.co, : self.tile[0], : self.tile[1]]
        at: np.ndarray = self.top + m * self.ci * self.size + s * i * width + r * j
        return at

    def place(self, values: np.ndarray) -> np.ndarray:
        """uint64 [O, rows, columns] from the coefficients at `positions`, uint64 [tiles, answers, positions.size]."""
        rows, columns = self.conv.result
        out = np.empty((self.answers * self.co, rows, columns), np.uint64)
        for part, (row, column) in zip(values, self.tiles, strict=True):
            place = out[:, row : row + self.tile[0], column : column + self.tile[1]]
            read = part.reshape(self.answers * self.co, *self.tile)
            place[...] = read[:, : place.shape[1], : place.shape[2]]
        return out[: self.conv.outputs]


@dataclass(frozen=True)
class Prices:
    """Milliseconds of one polynomial of weights, one product, one polynomial of the input, and one answer.

    A polynomial of weights takes 0.44, but a batch shares it and later batches find it in the cache; the price is that
    of a batch of four. Others count both parties' work.
    """

    weight: float = 0.11
    product: float = 0.26
    input: float = 3.1
    answer: float = 4.7

    def of(self, packing: Packing) -> float:
        """Milliseconds for one inference; transfer of the ciphertexts at 100 MB/s is in the prices."""
        tiles = packing.count
        ends = tiles * (packing.inputs * self.input + packing.answers * self.answer)
        return packing.weights * (self.weight + tiles * self.product) + ends


@cache
def pack(conv: Convolution, degree: int, prices: Prices = Prices()) -> Packing:
    """The cheapest packing of `conv`. Raises ShoalError if not even one output's window fits into a polynomial."""
    found = min(_candidates(conv, degree), key=prices.of, default=None)
    if found is None:
        raise ShoalError(
            f"found a kernel that reads {prod(conv.extent)} values at once; need at most {degree}; use a smaller "
            "kernel or dilation"
        )
    return found


def _candidates(conv: Convolution, degree: int) -> Iterator[Packing]:
    for tile in _tiles(conv):
        size = Packing(conv, degree, 1, 1, tile).size
        for ci in _blocks(min(conv.channels, degree // size)):
            for co in {min(conv.outputs, degree // (ci * size)), min(conv.outputs, ci)} - {0}:
                if ci * co * size <= degree:
                    yield Packing(conv, degree, ci, co, tile)


def _tiles(conv: Convolution) -> Iterator[Pair]:
    """Whole planes, and planes cut into equal parts, rows first."""
    rows, columns = conv.result
    for cuts in sorted({ceil(rows / n) for n in range(1, rows + 1)}, reverse=True):
        yield cuts, columns
    for cuts in sorted({ceil(columns / n) for n in range(2, columns + 1)}, reverse=True):
        yield 1, cuts


def _blocks(most: int) -> Iterator[int]:
    """Numbers of channels to try: all up to 64, then those that cut evenly."""
    yield from range(1, min(most, 64) + 1)
    yield from sorted({ceil(most / n) for n in range(1, 65)} - set(range(65)))
