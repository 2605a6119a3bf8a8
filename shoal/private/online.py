"""The online phase: one inference from prepared randomness, plain ring arithmetic and a few exchanges. No SPU runs.

`Inference` walks the program at either party; `signs` has the steps of a ReLU, this file those of a linear layer, of
truncation and of the end. Values are int64 tensors [1, *shape] of additive shares mod 2^64.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from shoal.private.bitslice import pack, unpack
from shoal.private.clear import OPS, Step, biases, ring_products
from shoal.private.fixed import FixedPoint
from shoal.private.plan import LINEAR, Plan
from shoal.private.program import Program, Weights
from shoal.private.signs import Side, relu

GoOn = Callable[[int, Tensor], bool]


def exit_by_exit(program: Program) -> tuple[Step, ...]:
    """The steps in an order that finishes each output before anything that only later outputs need."""
    steps, order = {step.name: step for step in program.steps}, dict[str, Step]()
    for output in program.outputs:
        wanted = {output}
        for step in reversed(program.steps):
            wanted |= set(step.inputs) if step.name in wanted else set()
        order |= {name: step for name, step in steps.items() if name in wanted and name not in order}
    return tuple(order.values())


class Prepared:
    """A plan and, at the server, its weights made ready: whatever does not change from one inference to the next."""

    def __init__(self, plan: Plan, weights: Weights | None) -> None:
        self.plan, self.program = plan, plan.program
        self.fixed = FixedPoint(self.program.fraction_bits, self.program.field_bits)
        self.ring = ring_products(self.program, weights) if weights else {}
        self.bias = biases(self.program, weights) if weights else {}
        self.steps = exit_by_exit(self.program)
        self.last = {name: i for i, step in enumerate(self.steps) for name in step.inputs}


class Inference:
    """One party's run of one inference. `side.half` is used up by it and must never serve again."""

    def __init__(self, prepared: Prepared, side: Side) -> None:
        self.prepared, self.side, self.fixed = prepared, side, prepared.fixed
        self.opened: dict[str, Tensor] = {}
        self.relu_s = self.linear_s = 0.0
        self.step: Step | None = None

    def run(self, image: Tensor | None, early: GoOn | bool = False) -> list[Tensor]:
        """The client's logits of every output, int64 [1, *shape]; an empty list at the server, whose image is None.

        `early` exits: the client gives a function of an exit's number and logits that says whether to go on, the
        server True. Each exit but the last is then one more message, which tells the server whether it was taken.
        """
        program, logits = self.prepared.program, list[Tensor]()
        values = {program.input: torch.zeros((1, *program.input_shape), dtype=torch.int64) if image is None else image}
        for i, step in enumerate(self.prepared.steps):
            self.step, started = step, time.perf_counter()
            values[step.name] = self._value(step, [values[name] for name in step.inputs])
            self._count(step, time.perf_counter() - started)
            for name in (n for n in program.outputs if n == step.name):
                logits += self._reveal(values[name])
                if early and name != program.outputs[-1] and not self._goes_on(early, logits):
                    return logits
            for name in step.inputs:
                if self.prepared.last[name] == i:
                    values.pop(name, None), self.opened.pop(name, None)
        return logits

    def _goes_on(self, early: GoOn | bool, logits: list[Tensor]) -> bool:
        """The client decides by what it alone sees and sends one word: one latency."""
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
            return self._relu(step, inputs[0])
        # Everything else is a sum of values at public places: each party does it on its own share.
        return OPS[step.op].run(self, step, *inputs)

    def _linear(self, step: Step, x: Tensor) -> Tensor:
        """Shares of W x + b for shares of x, at scale 2^f again.

        1. The client sends d = x_C - r, 8 bytes a value: one latency, and none where d is known of an earlier reader.
        2. The client's share of W x is its share of W r; the server's is W (x_S + d) and its share of W r.
        3. Truncation; the server adds b.
        """
        prepared, name = self.side.half[f"{step.name}.masked_product"], step.inputs[0]
        if name not in self.opened:
            self.opened[name] = self._open(name, x)
        share = _shaped(prepared, torch.Size((1, *step.shape)))
        if self.side.client:
            return self.truncate(share)
        y = self.truncate(self.prepared.ring[step.name](self.opened[name]) + share)
        return y.add_(self.prepared.bias[step.name].view(-1, *[1] * (y.ndim - 2)))

    def _open(self, name: str, x: Tensor) -> Tensor:
        """x - r at the server; the client's own share of it, which nobody reads."""
        if not self.side.client:
            return x + _shaped(self.side.wire.receive(x.numel()), x.shape)
        self.side.wire.send(_flat(x) - self.side.half[f"{name}.mask"].ravel())
        return x

    def _relu(self, step: Step, x: Tensor) -> Tensor:
        """Kept positions go through `signs.relu`; the others stay as they are."""
        plan = self.prepared.plan.relus[step.name]
        flat = _flat(x)
        if plan.positions is None:
            out = relu(self.side, plan, flat)
        else:
            out = flat.copy()
            out[plan.positions] = relu(self.side, plan, flat[plan.positions])
        return _shaped(out, x.shape)

    def truncate(self, words: Tensor) -> Tensor:
        """Shares of y / 2^f, rounded, for shares of y: locally, or exactly where the program says so."""
        assert self.step is not None
        if self.step.name in self.prepared.plan.exact:
            return self._truncate_exactly(self.step.name, words)
        return self._shift(words)

    def _shift(self, words: Tensor) -> Tensor:
        """Each party alone; wrong by 2^(64-f) with probability abs(y) / 2^64, else by less than one unit."""
        share = _flat(words)
        bits = np.uint64(self.fixed.fraction_bits)
        out = share >> bits if self.side.client else np.uint64(0) - ((np.uint64(0) - share) >> bits)
        return _shaped(out, words.shape)

    def _truncate_exactly(self, name: str, words: Tensor) -> Tensor:
        """Never wrong by more than one unit, for abs(y) < 2^62. One exchange of a bit a value each way.

        y + 2^62 is below 2^63, so its shares wrap just when either has its top bit set. That is a + b - a b of the
        client's bit a and the server's b; a b comes from a prepared product of random bits as `select` does.
        """
        f = np.uint64(self.fixed.fraction_bits)
        flat = _flat(words) + np.uint64(self.side.client << 62)
        top, mask = pack(flat >> np.uint64(63)), self.side.half[f"{name}.top"]
        mine = top ^ mask
        theirs = self.side.wire.exchange(mine)
        wrap = self._either(name, unpack(top, flat.size), unpack(mask, flat.size), mine, theirs)
        out = (flat >> f) - (wrap << (np.uint64(64) - f))
        out -= np.uint64(self.side.client << 62) >> f
        return _shaped(out, words.shape)

    def _either(self, name: str, bit: np.ndarray, mask: np.ndarray, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """Shares of a or b: own bit, less the share of a b = (e + (1 - 2 e) p) (g + (1 - 2 g) q)."""
        e, g = unpack(mine, bit.size), unpack(theirs, bit.size)
        one, two = np.uint64(1), np.uint64(2)
        both = (one - two * e) * (one - two * g) * self.side.half[f"{name}.wrap"]
        both += g * (one - two * e) * mask
        if self.side.client:
            both += e * g
        return bit - both

    def _reveal(self, share: Tensor) -> list[Tensor]:
        """The server sends its share, the client adds it: 8 bytes a logit, one latency. Nothing at the server."""
        if not self.side.client:
            self.side.wire.send(_flat(share))
            return []
        return [share + _shaped(self.side.wire.receive(share.numel()), share.shape)]


def _flat(words: Tensor) -> np.ndarray:
    return words.contiguous().numpy().view(np.uint64).ravel()


def _shaped(words: np.ndarray, shape: torch.Size) -> Tensor:
    return torch.from_numpy(words.view(np.int64)).view(shape)
