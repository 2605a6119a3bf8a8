"""Runs a Program in the clear, on plain integers: bit for bit what the two parties compute on shares.

`VALUES` gives the value of each operation that `steps.OPS` describes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import ShoalError
from shoal.private.program.convolution import Team
from shoal.private.program.fixed import FixedPoint, RingConv2d, RingLinear, RingProduct
from shoal.private.program.program import Program, Weights
from shoal.private.program.steps import Shape, Step


class _Machine:
    """One Program ready to run: weights and masks as tensors, and the source of truncation noise."""

    def __init__(
        self,
        program: Program,
        weights: Weights,
        noise: np.random.Generator | None,
        shares: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.program, self.noise, self.shares, self.step = program, noise, shares, ""
        self.fixed = FixedPoint(program.fraction_bits, program.field_bits)
        self.ring, self.bias = ring_products(program, weights), biases(program, weights)
        self.masks = {s.name: _mask(program.keep[s.name], s.shape) for s in program.steps if s.name in program.keep}
        self.last = {name: i for i, step in enumerate(program.steps) for name in step.inputs}

    def __call__(self, x: Tensor) -> tuple[np.ndarray, ...]:
        values = {self.program.input: x}
        for i, step in enumerate(self.program.steps):
            self.step = step.name
            inputs = [values[name] for name in step.inputs]
            values[step.name] = VALUES[step.op](self, step, *inputs)
            for name in set(step.inputs) - set(self.program.outputs):
                if self.last[name] == i:
                    del values[name]
        return tuple(values[name].numpy() for name in self.program.outputs)

    def truncate(self, words: Tensor) -> Tensor:
        if self.shares is not None:
            return self._as_shares_do(words)
        words = self.fixed.truncate(words)
        if self.noise is None:
            return words
        # The sum of two fair bits, minus one: -1, 0, +1 with probabilities 1/4, 1/2, 1/4.
        bits = torch.from_numpy(self.noise.integers(0, 4, size=tuple(words.shape), dtype=np.uint8))
        return words + (bits & 1).long() + (bits >> 1).long() - 1

    def _as_shares_do(self, words: Tensor) -> Tensor:
        """The result of truncating the client's recorded share and the server's rest of `words`, locally or exactly."""
        assert self.shares is not None
        client = self.shares[self.step].view(np.uint64)
        server = words.numpy().view(np.uint64) - client
        f, zero, bits = np.uint64(self.fixed.fraction_bits), np.uint64(0), self.program.exact.get(self.step)
        if bits is None:
            out = (client >> f) - ((zero - server) >> f)
        else:
            ring, top, offset = np.uint64((1 << bits) - 1), np.uint64(bits - 1), np.uint64(1 << (bits - 2))
            client, server = (client + offset) & ring, server & ring
            wrap = (client >> top) | (server >> top)
            out = (client >> f) + (server >> f) - (wrap << (np.uint64(bits) - f)) - (offset >> f)
        return torch.from_numpy(out.view(np.int64))


def ring_products(program: Program, weights: Weights, team: Team | None = None) -> dict[str, RingProduct]:
    """Of each linear step, the product with its weights, prepared once; `team` shares the work of convolutions."""
    table: dict[str, RingProduct] = {}
    for step in (s for s in program.steps if s.op in ("conv2d", "linear")):
        weight = torch.from_numpy(weights.arrays[f"{step.name}.weight"])
        if step.op == "linear":
            table[step.name] = RingLinear(weight)
        else:
            table[step.name] = RingConv2d(weight, step.attrs, prod(step.shape[1:]), team)
    return table


def biases(program: Program, weights: Weights) -> dict[str, Tensor]:
    """Each linear step's bias, int64 at scale 2^f."""
    linear = [s.name for s in program.steps if s.op in ("conv2d", "linear")]
    return {name: torch.from_numpy(weights.arrays[f"{name}.bias"]) for name in linear}


def run_clear(
    program: Program,
    weights: Weights,
    images: np.ndarray | Tensor,
    *,
    noise: np.random.Generator | None = None,
    shares: dict[str, np.ndarray] | None = None,
    batch: int = 256,
) -> tuple[np.ndarray, ...]:
    """Logits of every output as float64 [N, *shape], exact modulo 2^64, for `images` [N, *input_shape].

    Images are preprocessed floats, or int64 words at scale 2^fraction_bits. `noise` adds -1, 0 or +1 unit
    (probabilities 1/4, 1/2, 1/4) to every truncation, as SPU's truncation does. `shares` gives, by step, the client's
    share (int64 words) of each product that a prepared inference truncated; the result is then that inference's, bit
    for bit. With one thread, a `batch` of 16 fits the caches and is faster. Raises ShoalError for images of another
    shape or type, and for weights of another program.
    """
    weights.check(program)
    words = torch.from_numpy(_words(program, images))
    machine = _Machine(program, weights, noise, shares)
    with torch.no_grad():
        parts = [machine(words[i : i + batch]) for i in range(0, len(words), batch)]
    return tuple(machine.fixed.decode(np.concatenate(column)) for column in zip(*parts, strict=True))


def _words(program: Program, images: np.ndarray | Tensor) -> np.ndarray:
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.shape[1:] != program.input_shape or not len(array):
        raise ShoalError(
            f"found images of shape {array.shape} at {program.input}; need (N, *{program.input_shape}) "
            "with N >= 1; resize them or compile for their size"
        )
    if array.dtype.kind == "f":
        return FixedPoint(program.fraction_bits).encode(array, "the images")
    if array.dtype != np.int64:
        raise ShoalError(
            f"found images of type {array.dtype} at {program.input}; need normalised floats, or int64 "
            "fixed-point words; apply the program's preprocessing"
        )
    return np.array(array)


def _mask(keep: np.ndarray, shape: Shape) -> Tensor:
    mask = np.zeros(prod(shape), dtype=bool)
    mask[keep] = True
    return torch.from_numpy(mask.reshape(shape))


def _conv2d(m: _Machine, step: Step, x: Tensor) -> Tensor:
    y = m.truncate(m.ring[step.name](x))
    return y.add_(m.bias[step.name].view(-1, 1, 1))  # in place: nobody else holds y, and passes over memory cost time


def _linear(m: _Machine, step: Step, x: Tensor) -> Tensor:
    return m.truncate(m.ring[step.name](x)).add_(m.bias[step.name])


def _relu(m: _Machine, step: Step, x: Tensor) -> Tensor:
    mask = m.masks.get(step.name)
    return x.clamp(min=0) if mask is None else torch.where(mask, x.clamp(min=0), x)


def _pool(m: _Machine, step: Step, x: Tensor) -> Tensor:
    (rows, columns), (down, right) = step.attrs["kernel"], step.attrs["stride"]
    total = x.unfold(2, rows, down).unfold(3, columns, right).sum((-1, -2))
    return m.truncate(total * m.fixed.reciprocal(rows * columns))


def _mean(m: _Machine, step: Step, x: Tensor) -> Tensor:
    total = x.sum((2, 3), keepdim=step.attrs["keepdim"])
    return m.truncate(total * m.fixed.reciprocal(x.shape[2] * x.shape[3]))


def _subsample(m: _Machine, step: Step, x: Tensor) -> Tensor:
    down, right = step.attrs["stride"]
    return x[:, :, ::down, ::right]


def _take(m: _Machine, step: Step, x: Tensor) -> Tensor:
    for dim, index in enumerate(step.attrs["index"], start=1):
        x = x if index is None else x.index_select(dim, torch.tensor(index))
    return x


VALUES: dict[str, Callable[..., Tensor]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "relu": _relu,
    "add": lambda m, step, x, y: x + y,
    "sub": lambda m, step, x, y: x - y,
    "avg_pool2d": _pool,
    "mean": _mean,
    "flatten": lambda m, step, x: x.flatten(1),
    "concat": lambda m, step, *xs: torch.cat(xs, 1),
    "subsample": _subsample,
    "take": _take,
    "pad": lambda m, step, x: F.pad(x, step.attrs["pads"]),
}
"""The value of each operation from (machine, step, inputs as int64 words [N, *shape])."""
