"""The online phase: one inference from prepared randomness, with plain ring arithmetic and a few exchanges, no SPU.

`Inference` runs the program at one party. `signs` holds the protocol of a ReLU; this file holds that of linear layers,
truncation and revealing the logits. Values are int64 tensors [1, *shape] of additive shares mod 2^64.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from shoal.private.program.clear import VALUES, biases, ring_products
from shoal.private.program.convolution import Team
from shoal.private.program.fixed import FixedPoint
from shoal.private.program.program import Weights
from shoal.private.program.steps import LINEAR, Step
from shoal.private.protocol.image import image_share
from shoal.private.protocol.layout import Layout, ReluLayout
from shoal.private.protocol.lifting import Lift, Names
from shoal.private.protocol.signs import ONES, Rider, Side, select, sign

GoOn = Callable[[int, Tensor], bool]


class Prepared:
    """What stays the same for all inferences: the layout and, at the server, the weights, ready to multiply with."""

    def __init__(self, layout: Layout, weights: Weights | None, threads: int = 1) -> None:
        """`threads` share the work of each convolution at the server."""
        self.layout, self.program = layout, layout.program
        self.fixed = FixedPoint(self.program.fraction_bits, self.program.field_bits)
        self.ring = ring_products(self.program, weights, Team(threads)) if weights else {}
        self.bias = biases(self.program, weights) if weights else {}
        self.last = {name: i for i, step in enumerate(layout.steps) for name in step.inputs}


class Inference:
    """One party's run of one inference. It uses up `side.half`, which must never be used again."""

    def __init__(self, prepared: Prepared, side: Side) -> None:
        self.prepared, self.side, self.fixed = prepared, side, prepared.fixed
        self.opened: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.lifts: dict[str, Lift] = {}
        self.narrow: dict[str, Counter[str]] = {}
        """Of values that are still shares modulo less than 2^64, how often each exact truncation is part of them."""
        self.relu_s = self.linear_s = 0.0
        self.step: Step | None = None

    def run(self, image: Tensor | None, early: GoOn | bool = False) -> list[Tensor]:
        """At the client the logits of every output, int64 [1, *shape]; at the server, whose image is None, no logits.

        For early exits, the client passes as `early` a function of an exit's number and logits that returns whether
        to go on, and the server passes True. At each exit but the last, one more message then tells the server
        whether the client goes on.
        """
        program, logits, schedule = self.prepared.program, list[Tensor](), self.prepared.layout.schedule
        self.values[program.input] = image_share(self.side.item, program.input_shape, image)
        for i, step in enumerate(self.prepared.layout.steps):
            self._run(step, schedule.before.get(step.name, ()))
            for name in (n for n in program.outputs if n == step.name):
                self._exchange_wraps(schedule.reveal.get(name, ()))
                logits += self._reveal(self._whole(name))
                if early and name != program.outputs[-1] and not self._goes_on(early, logits):
                    return logits
            for name in step.inputs:
                if self.prepared.last[name] == i:
                    self.values.pop(name, None), self.opened.pop(name, None)
        return logits

    def _run(self, step: Step, wraps: Names) -> None:
        self.step, started = step, time.perf_counter()
        self._exchange_wraps(wraps)
        if step.op == "add":
            self.narrow[step.name] = sum((self.narrow.get(name, Counter()) for name in step.inputs), Counter())
        elif step.op != "relu":
            for name in step.inputs:
                self._whole(name)
        self.values[step.name] = self._value(step, [self.values[name] for name in step.inputs])
        self._count(step, time.perf_counter() - started)

    def _exchange_wraps(self, names: Names) -> None:
        """Exchange wraps of exact truncations that cannot wait for a ReLU's message, one bit for each value."""
        if names:
            self._take_wraps(names, self.side.wire.exchange(self._wraps(names)))

    def _wraps(self, names: Names) -> np.ndarray:
        return np.concatenate([self.lifts[name].mask(self.side.half[f"{name}.top"]) for name in names])

    def _take_wraps(self, names: Names, theirs: np.ndarray) -> None:
        for name in names:
            lift = self.lifts[name]
            lift.resolve(theirs[: lift.top.size], self.side.half[f"{name}.wrap"])
            theirs = theirs[lift.top.size :]

    def _whole(self, name: str) -> Tensor:
        """The value as a share modulo 2^64; all of its wraps must be known."""
        for waiting, times in sorted(self.narrow.pop(name, Counter()).items()):
            correction = self.lifts[waiting].correction
            assert correction is not None
            # In place: a value with wraps to come is a truncation's or a sum's own memory, and nobody looks into it.
            # By NumPy: torch may use several threads here, which then keep a core busy.
            flat, shape = _flat(self.values[name]), self.values[name].shape
            flat += correction if times == 1 else np.uint64(times) * correction
            self.values[name] = _shaped(flat, shape)
        return self.values[name]

    def _goes_on(self, early: GoOn | bool, logits: list[Tensor]) -> bool:
        """Whether to go on. The client decides by the logits, which only it sees, and sends one word: one latency."""
        if not callable(early):
            return bool(self.side.wire.receive(1)[0])
        decision = early(len(logits) - 1, logits[-1])
        self.side.wire.send(np.array([decision], np.uint64))
        return decision

    def _count(self, step: Step, seconds: float) -> None:
        if step.op == "relu":
            self.relu_s += seconds
        else:
            self.linear_s += seconds

    def _value(self, step: Step, inputs: list[Tensor]) -> Tensor:
        if step.op in LINEAR:
            return self._linear(step, inputs[0])
        if step.op == "relu":
            return self._relu(step)
        # All other steps are sums of values at public positions; each party computes them on its own share.
        return VALUES[step.op](self, step, *inputs)

    def _linear(self, step: Step, x: Tensor) -> Tensor:
        """Shares of W x + b for shares of x, at scale 2^f again.

        1. The client sends d = x_C - r, 8 bytes per value: one latency. If another layer has read x before, d is known.
        2. The client's share of W x is its share of W r; the server's is W (x_S + d) plus its share of W r.
        3. Both truncate; the server adds b.

        If the truncation is exact, everything is modulo the power of two that the product fits in, which takes fewer
        limbs.
        """
        prepared, name = self.side.half[f"{step.name}.masked_product"], step.inputs[0]
        if name not in self.opened:
            self.opened[name] = self._open(name, x)
        share = _shaped(prepared, torch.Size((1, *step.shape)))
        if self.side.client:
            return self.truncate(share)
        bits = self.prepared.program.exact.get(step.name, self.fixed.field_bits)
        y = self.truncate(self.prepared.ring[step.name](self.opened[name], bits).add_(share))
        return y.add_(self.prepared.bias[step.name].view(-1, *[1] * (y.ndim - 2)))

    def _open(self, name: str, x: Tensor) -> Tensor:
        """x - r at the server; at the client its own share of x, which is not read."""
        if not self.side.client:
            return x + _shaped(self.side.wire.receive(x.numel()), x.shape)
        self.side.wire.send(_flat(x) - self.side.half[f"{name}.mask"].ravel())
        return x

    def _relu(self, step: Step) -> Tensor:
        """Kept positions go through `sign` and `select`, the others stay as they are. Wraps travel with the signs."""
        layout, name = self.prepared.layout.relus[step.name], step.inputs[0]
        wraps = self.prepared.layout.schedule.rides.get(step.name, ())
        take, low = partial(self._take_wraps, wraps), _kept(layout, _flat(self.values[name]))
        positive = sign(self.side, layout, low, Rider(self._wraps(wraps), take) if wraps else None)
        if self.side.client:
            positive ^= ONES
        x = self._whole(name)
        out = select(self.side, layout, positive, _kept(layout, _flat(x)))
        if layout.positions is None:
            return _shaped(out, x.shape)
        whole = _flat(x).copy()
        whole[layout.positions] = out
        return _shaped(whole, x.shape)

    def truncate(self, words: Tensor) -> Tensor:
        """Shares of y / 2^f, rounded, for shares of y.

        Locally, each party truncates its share alone. The result is wrong by 2^(64-f) units with probability
        abs(y) / 2^64, otherwise by less than one unit. Where the program asks for exact truncation, the result is never
        wrong by more than one unit, but it is modulo less than 2^64 until the wraps are exchanged; see
        `shoal.private.protocol.lifting`.
        """
        assert self.step is not None
        name, share = self.step.name, _flat(words)
        if name in self.prepared.program.exact:
            bits = self.prepared.program.exact[name]
            lift = self.lifts[name] = Lift(share, bits, self.fixed.fraction_bits, self.side.client)
            self.narrow[name] = Counter((name,))
            return _shaped(lift.low, words.shape)
        f = np.uint64(self.fixed.fraction_bits)
        out = share >> f if self.side.client else np.uint64(0) - ((np.uint64(0) - share) >> f)
        return _shaped(out, words.shape)

    def _reveal(self, share: Tensor) -> list[Tensor]:
        """The client's logits: the server sends its share, 8 bytes per logit, one latency. Empty at the server."""
        if not self.side.client:
            self.side.wire.send(_flat(share))
            return []
        return [share + _shaped(self.side.wire.receive(share.numel()), share.shape)]


def _kept(layout: ReluLayout, flat: np.ndarray) -> np.ndarray:
    return flat if layout.positions is None else flat[layout.positions]


def _flat(words: Tensor) -> np.ndarray:
    return words.contiguous().numpy().view(np.uint64).ravel()


def _shaped(words: np.ndarray, shape: torch.Size) -> Tensor:
    return torch.from_numpy(words.view(np.int64)).view(shape)
