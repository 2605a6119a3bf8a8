"""The offline phase: correlated randomness for several inferences, made with a two-party multiplication engine.

The same functions run at both parties. An `Engine` does the multiplications; in use it is SPU
(`shoal.private.engine.maker`). All products of one kind go through it together, whatever their layer or inference,
because engines are more efficient on long vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shoal.private.program.steps import Step
from shoal.private.protocol.bitslice import unpack
from shoal.private.protocol.carry import Gate
from shoal.private.protocol.layout import Layout, ReluLayout
from shoal.private.protocol.randomness import Half, expand, seeded

Binary = Callable[[np.ndarray, np.ndarray], np.ndarray]
Masks = Callable[[Step], np.ndarray]


class Engine(Protocol):
    """Multiplies values that the two parties hold; each party gets a share of the result. All arrays are uint64."""

    def ands(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Boolean shares [k] of a & b, for boolean shares of both."""

    def chosen(self, bits: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Arithmetic shares [k] of bit * word, for boolean shares of bits (0 or 1) and arithmetic shares of words."""

    def products(self, steps: Sequence[Step], masks: Masks | None, count: int) -> Iterator[tuple[Step, np.ndarray]]:
        """Each of `steps`, in any order, with arithmetic shares [count, *step.shape] of W times the client's masks.

        W are the server's weights of the step. `masks` gives the masks [count, *input shape] of a step; it is None at
        the server. Nothing is truncated; there is no bias. If the step is truncated exactly, the shares may be those of
        the product modulo its ring.
        """


def prepare(layout: Layout, engine: Engine, client: bool, seeds: Sequence[bytes]) -> list[Half]:
    """One party's halves for ``len(seeds)`` inferences; each inference has its own fresh seed at each party."""
    items = [_Item(layout, client, seed) for seed in seeds]

    def masks(step: Step) -> np.ndarray:
        return np.stack([item.own(f"{step.inputs[0]}.mask") for item in items])

    for step, shares in engine.products(layout.linear, masks if client else None, len(items)):
        for item, share in zip(items, shares, strict=True):
            item.stored[f"{step.name}.masked_product"] = np.ascontiguousarray(share)
    _run([job for item in items for job in _pair_jobs(item)], engine.ands)
    relus = [(item, relu) for item in items for relu in layout.relus.values()]
    gates = [_Gates(item, relu) for item, relu in relus]
    for bit in range(1, max((g.size for each in gates for g in each.gates), default=1) - 1):
        _run([job for each in gates for job in each.base_jobs(bit)], engine.ands)
    _run([job for each in gates for job in each.block_jobs()], engine.ands)
    for each in gates:
        each.finish()
    _run([job for item in items for job in _word_jobs(item)], engine.chosen)
    return [Half(item.seed, item.stored, layout.fields(client)) for item in items]


class _Item:
    """One party's half for one inference while it is being made."""

    def __init__(self, layout: Layout, client: bool, seed: bytes) -> None:
        self.layout, self.client, self.seed = layout, client, seed
        self.random = expand(seed, seeded(layout.fields(client)))
        self.stored: dict[str, np.ndarray] = {}

    def own(self, name: str) -> np.ndarray:
        """The party's own random words of this name."""
        return self.random[name]

    def keep(self, name: str) -> Callable[[np.ndarray], None]:
        """A function that stores an array under `name`."""

        def put(array: np.ndarray) -> None:
            self.stored[name] = array

        return put


@dataclass
class _Job:
    """Two operands of the same shape, and a function that takes the result."""

    a: np.ndarray
    b: np.ndarray
    take: Callable[[np.ndarray], None]


def _run(jobs: list[_Job], operation: Binary) -> None:
    """Run all of `jobs` in one call of `operation`."""
    jobs = [job for job in jobs if job.a.size]
    if not jobs:
        return
    a, b = (np.concatenate([getattr(job, side).ravel() for job in jobs]) for side in "ab")
    result, start = operation(a, b), 0
    for job in jobs:
        # Copies: a view would keep the words of all other inferences in memory.
        job.take(result[start : start + job.a.size].reshape(job.a.shape).copy())
        start += job.a.size


def _pair_jobs(item: _Item) -> Iterator[_Job]:
    """Products of the client's and the server's masks. Each party knows its factor; the other's share of it is zero."""
    for relu in item.layout.relus.values():
        masks = item.own(f"{relu.name}.digits")
        pairs = np.array(relu.carry.pairs, np.int64).reshape(-1, 2)
        mine = masks[pairs[:, 0 if item.client else 1]]
        none = np.zeros_like(mine)
        a, b = (mine, none) if item.client else (none, mine)
        yield _Job(a, b, item.keep(f"{relu.name}.pairs"))


class _Gates:
    """Products of masks for all gates of one relu step in one inference, block by block."""

    def __init__(self, item: _Item, relu: ReluLayout) -> None:
        self.item, self.relu = item, relu
        self.gates = [gate for level in relu.carry.levels for gate in level]
        masks, starts = item.own(f"{relu.name}.inputs"), np.cumsum([0, *(g.inputs for g in self.gates)])
        self.masks = [masks[s : s + g.inputs] for s, g in zip(starts, self.gates, strict=False)]
        self.base = [self._start(g, m) for g, m in zip(self.gates, self.masks, strict=True)]
        self.blocks: dict[tuple[int, int], np.ndarray] = {}

    def _start(self, gate: Gate, masks: np.ndarray) -> np.ndarray:
        base = np.zeros((gate.base, masks.shape[1]), np.uint64)
        base[[1 << i for i in range(gate.size - 1)]] = masks[: gate.size - 1]
        return base

    def base_jobs(self, bit: int) -> Iterator[_Job]:
        """Products over the sets whose highest bit is `bit`: its mask times the products over the lower sets."""
        for gate, base in zip(self.gates, self.base, strict=True):
            if bit < gate.size - 1:
                lower, top = base[1 : 1 << bit], base[1 << bit]
                yield _Job(lower, np.broadcast_to(top, lower.shape), _assign(base[(1 << bit) + 1 : 2 << bit]))

    def block_jobs(self) -> Iterator[_Job]:
        """For each further input, its mask times the products of its block."""
        for at, (gate, base, masks) in enumerate(zip(self.gates, self.base, self.masks, strict=True)):
            for i, size in enumerate(gate.blocks):
                top = masks[gate.size - 1 + i]
                self.blocks[at, i] = np.empty((size - 1, masks.shape[1]), np.uint64)
                yield _Job(base[1:size], np.broadcast_to(top, (size - 1, top.size)), _assign(self.blocks[at, i]))

    def finish(self) -> None:
        """Store the products in the order in which `signs` reads them."""
        parts = []
        for at, (gate, base) in enumerate(zip(self.gates, self.base, strict=True)):
            parts.append(base[[s for s in range(1, gate.base) if s & (s - 1)]])
            parts += [self.blocks[at, i] for i in range(len(gate.blocks))]
        empty = np.empty((0, self.relu.words), np.uint64)
        self.item.stored[f"{self.relu.name}.products"] = np.concatenate([empty, *parts])


def _assign(target: np.ndarray) -> Callable[[np.ndarray], None]:
    def put(array: np.ndarray) -> None:
        target[...] = array

    return put


def _word_jobs(item: _Item) -> Iterable[_Job]:
    """Bits times words: for each kept ReLU its random bit times its random word and times 1; and those of wraps."""
    for relu in item.layout.relus.values():
        bits, value = unpack(item.own(f"{relu.name}.choice"), relu.count), item.own(f"{relu.name}.value")
        one = np.full(relu.count, item.client, np.uint64)
        yield _Job(bits, value, item.keep(f"{relu.name}.chosen_value"))
        yield _Job(bits, one, item.keep(f"{relu.name}.choice_word"))
    for name, count in item.layout.exact.items():
        top = unpack(item.own(f"{name}.top"), count)
        none = np.zeros(count, np.uint64)
        yield _Job(top, none, item.keep(f"{name}.wrap")) if item.client else _Job(none, top, item.keep(f"{name}.wrap"))
