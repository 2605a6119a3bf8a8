"""What one item of correlated randomness consists of, and what the inference that spends it exchanges.

A `Layout` says which tensors are masked and which products, signs and truncations are prepared. It is public and
follows from the Program alone, so both parties derive the same one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shoal.private.program.program import Program
from shoal.private.program.steps import LINEAR, TRUNCATING, Shape, Step
from shoal.private.protocol.bitslice import plane_words
from shoal.private.protocol.carry import Carry
from shoal.private.protocol.lifting import Schedule, schedule
from shoal.private.protocol.rounds import rounds

HEADER_BYTES = 8


@dataclass(frozen=True, eq=False)
class ReluLayout:
    """One relu step: `count` kept values, their flat `positions` in (C, H, W) order (None: all), and the circuit."""

    name: str
    count: int
    positions: np.ndarray | None
    carry: Carry

    @property
    def words(self) -> int:
        """Words in a plane of its values."""
        return plane_words(self.count)


@dataclass(frozen=True)
class Field:
    """An array of uint64 words that a party holds for one inference.

    Seeded arrays are the party's own random words, expanded from its seed. The others are stored.
    """

    name: str
    shape: tuple[int, ...]
    seeded: bool


@dataclass(frozen=True)
class Online:
    """Bytes and messages of one inference, both ways, without TLS; one-way latencies in sequence."""

    bytes: int
    messages: int
    latencies: int


class Layout:
    """The layout of one image's inference with `program`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.shapes: dict[str, Shape] = {program.input: program.input_shape}
        self.shapes |= {step.name: step.shape for step in program.steps}

    @cached_property
    def linear(self) -> tuple[Step, ...]:
        """Steps for which the product of the server's weights with a mask is prepared."""
        return tuple(s for s in self.program.steps if s.op in LINEAR)

    @property
    def truncating(self) -> tuple[Step, ...]:
        """Steps whose result is a truncated product."""
        return tuple(s for s in self.program.steps if s.op in TRUNCATING)

    @cached_property
    def masked(self) -> dict[str, Shape]:
        """Tensors that the client masks and sends to the server, in order of use; all readers share one mask."""
        return {step.inputs[0]: self.shapes[step.inputs[0]] for step in self.linear}

    @cached_property
    def relus(self) -> dict[str, ReluLayout]:
        """Every relu step by name."""
        layouts = {}
        for step in (s for s in self.program.steps if s.op == "relu"):
            kept = self.program.keep.get(step.name)
            positions = None if kept is None else kept.astype(np.int64)
            count = math.prod(step.shape) if kept is None else len(kept)
            layouts[step.name] = ReluLayout(step.name, count, positions, Carry(self.program.sign_bits[step.name]))
        return layouts

    @property
    def word_ands(self) -> int:
        """ANDs of 64-bit words in the offline phase of one inference."""
        wraps = self.wrap_words(self.exact)
        return sum(relu.words * relu.carry.products for relu in self.relus.values()) + wraps

    @property
    def and_rounds(self) -> int:
        """Dependent rounds of ANDs in the offline phase. Pairs and wraps are in the first, with the gates' first."""
        first = int(bool(self.relus or self.exact))
        return max([first, *(len(rounds(relu.carry)) for relu in self.relus.values())])

    @cached_property
    def exact(self) -> dict[str, int]:
        """Of each step that is truncated exactly, the number of its values; each needs a prepared correlation."""
        return {s.name: math.prod(s.shape) for s in self.program.steps if s.name in self.program.exact}

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The steps in an order that finishes each output before any step that only later outputs need."""
        steps, order = {step.name: step for step in self.program.steps}, dict[str, Step]()
        for output in self.program.outputs:
            wanted = {output}
            for step in reversed(self.program.steps):
                wanted |= set(step.inputs) if step.name in wanted else set()
            order |= {name: step for name, step in steps.items() if name in wanted and name not in order}
        return tuple(order.values())

    @cached_property
    def schedule(self) -> Schedule:
        """When the wraps of exact truncations are exchanged."""
        p = self.program
        return schedule(self.steps, p.outputs, p.exact, p.fraction_bits, p.sign_bits)

    def fields(self, client: bool) -> Iterator[Field]:
        """All arrays of one party for one inference."""
        if client:
            yield from (Field(f"{name}.mask", shape, True) for name, shape in self.masked.items())
        yield from (Field(f"{step.name}.masked_product", step.shape, False) for step in self.linear)
        for name, count in self.exact.items():
            yield Field(f"{name}.top", (plane_words(count),), True)
            yield Field(f"{name}.wrap", (count,), False)
        for relu in self.relus.values():
            yield from relu_fields(relu)

    @cached_property
    def online(self) -> Online:
        """What one inference exchanges, by the closed forms of docs/private_inference.md."""
        one_way, both_ways = self._message_words
        words, messages = sum(one_way) + 2 * sum(both_ways), len(one_way) + 2 * len(both_ways)
        return Online(8 * words + HEADER_BYTES * messages, messages, len(one_way) + len(both_ways))

    @property
    def serial_bytes(self) -> int:
        """Bytes of one inference that cross the link one after the other.

        Of an exchange, both directions travel at the same time and count once. Masked values and logits travel one way
        while the other direction is idle, so this is more than half of all bytes.
        """
        one_way, both_ways = self._message_words
        return 8 * (sum(one_way) + sum(both_ways)) + HEADER_BYTES * (len(one_way) + len(both_ways))

    @property
    def _message_words(self) -> tuple[list[int], list[int]]:
        """Words of each message that travels one way, and of each direction of each exchange."""
        outputs = [math.prod(self.shapes[name]) for name in self.program.outputs]
        one_way = [math.prod(shape) for shape in self.masked.values()] + outputs
        both_ways = [self.wrap_words(names) for names in self.schedule.alone]
        for relu in self.relus.values():
            wraps = self.wrap_words(self.schedule.rides.get(relu.name, ()))
            both_ways += [relu.carry.monomials * relu.words + wraps, relu.words + relu.count]
            both_ways += [sum(g.inputs for g in level) * relu.words for level in relu.carry.levels]
        return one_way, both_ways

    def wrap_words(self, names: Iterable[str]) -> int:
        """Words in a message with the wraps of these steps."""
        return sum(plane_words(self.exact[name]) for name in names)

    def stored_bytes(self, client: bool) -> int:
        """Bytes of one party's stored arrays for one inference, without the seed, names and file header."""
        return sum(8 * math.prod(f.shape) for f in self.fields(client) if not f.seeded)


def relu_fields(relu: ReluLayout) -> Iterator[Field]:
    """Arrays of one relu step: both parties have the same ones, with different contents."""
    name, carry, words = relu.name, relu.carry, relu.words
    gates = [gate for level in carry.levels for gate in level]
    yield Field(f"{name}.digits", (carry.monomials, words), True)
    yield Field(f"{name}.pairs", (len(carry.pairs), words), False)
    yield Field(f"{name}.inputs", (sum(g.inputs for g in gates), words), True)
    yield Field(f"{name}.products", (sum(g.products for g in gates), words), False)
    yield Field(f"{name}.choice", (words,), True)
    yield Field(f"{name}.value", (relu.count,), True)
    yield Field(f"{name}.choice_word", (relu.count,), False)
    yield Field(f"{name}.chosen_value", (relu.count,), False)
