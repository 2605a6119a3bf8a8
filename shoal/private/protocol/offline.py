"""The offline phase: correlated randomness for several inferences, made with a two-party multiplication engine.

The same functions run at both parties. An `Engine` does the multiplications; in use it is SPU
(`shoal.private.engine.maker`). All products of one kind go through it together, whatever their layer or inference,
because engines are more efficient on long vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from shoal.errors import ShoalError
from shoal.private.program.steps import Step
from shoal.private.protocol.bitslice import unpack
from shoal.private.protocol.layout import Layout, ReluLayout
from shoal.private.protocol.randomness import Half, expand, seeded
from shoal.private.protocol.rounds import rounds

Masks = Callable[[Step], np.ndarray]


class Engine(Protocol):
    """Multiplies values that the two parties hold; each party gets a share of the result. All arrays are uint64."""

    def ands(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Boolean shares [k] of a & b, for boolean shares of both."""

    def chosen(self, bits: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Arithmetic shares [k] of bit * word, for boolean shares of bits (0 or 1) and arithmetic shares of words."""

    def lifted(self, bits: np.ndarray) -> np.ndarray:
        """Arithmetic shares [k] of bits, for boolean shares of bits (0 or 1)."""

    def products(self, steps: Sequence[Step], masks: Masks | None, count: int) -> Iterator[tuple[Step, np.ndarray]]:
        """Each of `steps`, in any order, with arithmetic shares [count, *step.shape] of W times the client's masks.

        W are the server's weights of the step. `masks` gives the masks [count, *input shape] of a step; it is None at
        the server. Nothing is truncated; there is no bias. If the step is truncated exactly, the shares may be those of
        the product modulo its ring.
        """


def prepare(layout: Layout, engine: Engine, client: bool, seeds: Sequence[bytes]) -> list[Half]:
    """One party's halves for ``len(seeds)`` inferences; each inference has its own fresh seed at each party.

    Raises ShoalError for equal seeds: inferences with the same masks would reveal the difference of their images.
    """
    if len(set(seeds)) < len(seeds):
        raise ShoalError("found one seed for several prepared items; need a fresh one for each; make them again")
    items = [_Item(layout, client, seed) for seed in seeds]

    def masks(step: Step) -> np.ndarray:
        return np.stack([item.own(f"{step.inputs[0]}.mask") for item in items])

    for step, shares in engine.products(layout.linear, masks if client else None, len(items)):
        for item, share in zip(items, shares, strict=True):
            item.stored[f"{step.name}.masked_product"] = np.ascontiguousarray(share)
    gates = [_Gates(item, relu) for item in items for relu in layout.relus.values()]
    for depth in range(layout.and_rounds):
        # Pairs and wraps depend on nothing, so they join the first round.
        first = [] if depth else [job for item in items for job in (*_pair_jobs(item), *_wrap_jobs(item))]
        _run(first + [job for each in gates for job in each.jobs(depth)], engine.ands)
    for each in gates:
        each.finish()
    _run([job for item in items for job in _lift_jobs(item)], engine.lifted)
    _run([job for item in items for job in _word_jobs(item)], engine.chosen)
    return [Half(item.seed, item.stored, layout.fields(client)) for item in items]


class _Item:
    """One party's half for one inference while it is being made."""

    def __init__(self, layout: Layout, client: bool, seed: bytes) -> None:
        self.layout, self.client, self.seed = layout, client, seed
        self.random = expand(seed, seeded(layout.fields(client)))
        self.stored: dict[str, np.ndarray] = {}
        self.wraps: dict[str, np.ndarray] = {}
        """Of each step that is truncated exactly, boolean shares of p q in planes (see `_wrap_jobs`)."""

    def own(self, name: str) -> np.ndarray:
        """The party's own random words of this name."""
        return self.random[name]

    def keep(self, name: str) -> Callable[[np.ndarray], None]:
        """A function that stores an array under `name`."""
        return partial(self.stored.__setitem__, name)

    def meet(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shares of the client's words and of the server's: a party's own words, and zeros for those of the other."""
        none = np.zeros_like(words)
        return (words, none) if self.client else (none, words)


@dataclass
class _Job:
    """Operands of the same shape, and a function that takes the result."""

    operands: tuple[np.ndarray, ...]
    take: Callable[[np.ndarray], None]


def _run(jobs: list[_Job], operation: Callable[..., np.ndarray]) -> None:
    """Run all of `jobs` in one call of `operation`."""
    jobs = [job for job in jobs if job.operands[0].size]
    if not jobs:
        return
    sides = zip(*(job.operands for job in jobs), strict=True)
    result, start = operation(*(np.concatenate([each.ravel() for each in side]) for side in sides)), 0
    for job in jobs:
        shape, end = job.operands[0].shape, start + job.operands[0].size
        # Copies: a view would keep the words of all other inferences in memory.
        job.take(result[start:end].reshape(shape).copy())
        start = end


def _pair_jobs(item: _Item) -> Iterator[_Job]:
    """Products of the client's and the server's masks."""
    for relu in item.layout.relus.values():
        masks = item.own(f"{relu.name}.digits")
        pairs = np.array(relu.carry.pairs, np.int64).reshape(-1, 2)
        mine = masks[pairs[:, 0 if item.client else 1]]
        yield _Job(item.meet(mine), item.keep(f"{relu.name}.pairs"))


def _wrap_jobs(item: _Item) -> Iterator[_Job]:
    """Products p q of the client's bit and the server's bit, for each value that is truncated exactly."""
    for name in item.layout.exact:
        yield _Job(item.meet(item.own(f"{name}.top")), partial(item.wraps.__setitem__, name))


class _Gates:
    """Products of masks for all gates of one relu step in one inference, round by round."""

    def __init__(self, item: _Item, relu: ReluLayout) -> None:
        self.item, self.relu, self.rounds = item, relu, rounds(relu.carry)
        masks = item.own(f"{relu.name}.inputs")
        self.inputs = len(masks)
        products = sum(len(each.made) for each in self.rounds)
        self.table = np.concatenate([masks, np.empty((products, relu.words), np.uint64)])

    def jobs(self, depth: int) -> Iterator[_Job]:
        """The ANDs of one round, counted from 0; they need the results of the rounds before it."""
        if depth < len(self.rounds):
            each = self.rounds[depth]
            yield _Job((self.table[each.left], self.table[each.right]), self._assign(each.made))

    def _assign(self, rows: np.ndarray) -> Callable[[np.ndarray], None]:
        def put(array: np.ndarray) -> None:
            self.table[rows] = array

        return put

    def finish(self) -> None:
        """Store the products; the table's order is that in which `signs` reads them."""
        self.item.stored[f"{self.relu.name}.products"] = self.table[self.inputs :].copy()


def _lift_jobs(item: _Item) -> Iterator[_Job]:
    """Bits as words: the random bit of each kept ReLU, and p q of each value that is truncated exactly."""
    for relu in item.layout.relus.values():
        bits = unpack(item.own(f"{relu.name}.choice"), relu.count)
        yield _Job((bits,), item.keep(f"{relu.name}.choice_word"))
    for name, count in item.layout.exact.items():
        yield _Job((unpack(item.wraps[name], count),), item.keep(f"{name}.wrap"))


def _word_jobs(item: _Item) -> Iterator[_Job]:
    """For each kept ReLU its random bit times its random word."""
    for relu in item.layout.relus.values():
        bits, value = unpack(item.own(f"{relu.name}.choice"), relu.count), item.own(f"{relu.name}.value")
        yield _Job((bits, value), item.keep(f"{relu.name}.chosen_value"))
