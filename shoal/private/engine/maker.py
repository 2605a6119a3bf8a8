"""SPU as the engine of the offline phase: exact ring products, and products of shares that the parties write.

A party writes its own random words as its share of a value (`shares.replaced`), SPU multiplies, and the party reads its
share of the result. No value is opened. This runs in a worker process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import spu
from spu import libspu

from shoal.private.engine.layers import multiply
from shoal.private.engine.runs import pieces
from shoal.private.engine.shapes import channels_last, hwc, in_spu_order, parameter_shapes
from shoal.private.engine.shares import ADDITIVE, BOOLEAN, replaced, words
from shoal.private.engine.spu import CLIENT, SERVER, Settings, compile_code
from shoal.private.products.exchange import MaskSender, Multiplier
from shoal.private.products.parameters import packings
from shoal.private.products.workers import hire
from shoal.private.program.program import Program
from shoal.private.program.steps import Step
from shoal.private.protocol.offline import Masks

# Ring words are int64. The flag applies to the whole process, which does nothing else.
jax.config.update("jax_enable_x64", True)

START = 8
"""The length for which an executable is compiled; its text with another length is the executable of that length."""
PAIR: dict[str, tuple[int, ...]] = {"x": (START,), "y": (START,)}
KINDS: dict[str, tuple[type, Callable[[Any, Any], Any]]] = {
    "word": (np.int64, lambda x, y: x & y),
    "bit": (np.bool_, lambda x, y: x < y),
    "sum": (np.int64, lambda x, y: x + y),
}
"""Of each kind of share, its type, and an operation on two private words whose result is such a share."""


@dataclass(frozen=True)
class Operation:
    """An operation on two vectors of shares that a party writes. `takes` names it among those of the same `kind`.

    `operands` are their kinds, from KINDS; `stored` is SPU's storage type of the result.
    """

    kind: str
    takes: str
    function: Callable[[Any, Any], Any]
    operands: tuple[str, str]
    stored: bytes


AND = Operation("and", "words", lambda x, y: (x & y,), ("word", "word"), BOOLEAN)
CHOSEN = Operation("chosen", "words", lambda x, y: (jnp.where(x, y, 0),), ("bit", "sum"), ADDITIVE)
LIFTED = Operation("chosen", "bits", lambda x, y: (x.astype(jnp.int64) + y,), ("bit", "sum"), ADDITIVE)
"""The sum makes SPU convert the bits, which it would otherwise put off."""


class SpuEngine:
    """One party's `Engine` for `program`. `arrays` holds the server's int64 weights; it is None at the client."""

    def __init__(
        self, program: Program, link: Any, rank: int, settings: Settings, arrays: dict[str, np.ndarray] | None
    ) -> None:
        config = settings.runtime_config()
        self.packings = packings(program) if settings.products == "seal" else {}
        # Workers start while SPU makes its keys below.
        crew = self.crew = hire(settings.workers) if self.packings else None
        self.rank, self.runtime, self.io = rank, spu.Runtime(link, config), spu.Io(2, config)
        self.shapes = {program.input: program.input_shape} | {s.name: s.shape for s in program.steps}
        self.kernels = {k: v for k, v in parameter_shapes(program).items() if k.endswith(".weight")}
        self.codes: dict[Any, Any] = {}
        self.runs: list[tuple[str, str, float]] = []
        """Of each run of SPU, in order: its kind, its step (or what it takes), and its seconds."""
        self.link = link
        self.sealed: list[tuple[str, float, int, int]] = []
        """Of each product of SEAL: its step, its seconds, and the bytes that this party sent and received."""
        for name, shape in self.kernels.items():
            if name.removesuffix(".weight") in self.packings:
                continue
            self._own(name, None if arrays is None else in_spu_order(arrays[name]), shape, SERVER)
        self.like = {kind: self._template(function) for kind, (_, function) in KINDS.items()}
        if crew is not None:
            bits = program.products["plain_bits"]
            if arrays is None:
                self.masks = MaskSender(self.packings, bits, crew)
            else:
                weights = {name: arrays[f"{name}.weight"] for name in self.packings}
                self.multiplier = Multiplier(self.packings, bits, weights, crew, settings.cache_bytes)

    def ands(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """See Engine. SPU's AND of boolean shares takes 2 bits each way and 2 of Ferret's transfers per bit.

        Ferret is the limit: of the 0.24 us of a core per bit at each party, its transfers take 0.16. With refills, both
        directions together take 0.55 bytes per bit (benchmarks/results/private_ands.json).
        """
        return self._in_pieces(AND, a, b)

    def chosen(self, bits: np.ndarray, words: np.ndarray) -> np.ndarray:
        """See Engine. SPU's product of a boolean and an arithmetic share takes 0.8 us and 8.1 bytes each way."""
        return self._in_pieces(CHOSEN, bits, words)

    def lifted(self, bits: np.ndarray) -> np.ndarray:
        """See Engine. It takes one transfer in place of the two of `chosen`: 8 bytes one way and a bit the other."""
        return self._in_pieces(LIFTED, bits, np.zeros_like(bits))

    def products(self, steps: Sequence[Step], masks: Masks | None, count: int) -> Iterator[tuple[Step, np.ndarray]]:
        """See Engine. Steps that have a packing are multiplied by SEAL, if the settings ask for it, others by SPU."""
        packed = [step for step in steps if step.name in self.packings]
        if packed:
            yield from self._sealed(packed, masks, count)
        for step in (s for s in steps if s.name not in self.packings):
            yield step, self._product(step, None if masks is None else masks(step), count)

    def _sealed(self, steps: Sequence[Step], masks: Masks | None, count: int) -> Iterator[tuple[Step, np.ndarray]]:
        """The products of SEAL, over SPU's connection."""
        connection, sent, received, begun = _Connection(self.link, 1 - self.rank), 0, 0, time.perf_counter()
        if masks is None:
            made = self.multiplier.products(connection, steps, count)
        else:
            made = self.masks.products(connection, steps, masks, count)
        for step, shares in made:
            now = time.perf_counter()
            self.sealed.append((step.name, now - begun, connection.sent - sent, connection.received - received))
            sent, received, begun = connection.sent, connection.received, now
            yield step, shares

    def _product(self, step: Step, masks: np.ndarray | None, count: int) -> np.ndarray:
        """Shares of one step's product by SPU; the `count` inferences share its ciphertexts."""
        shape, name = (count, *hwc(self.shapes[step.inputs[0]])), f"{step.name}.weight"
        axes = (0, *channels_last(len(shape) - 1))
        self._own("mask", None if masks is None else masks.view(np.int64).transpose(axes), shape, CLIENT)
        key, shapes = ("product", step.name, count), {"mask": shape, name: self.kernels[name]}
        compiled = partial(compile_code, partial(_masked, step), shapes, ("out",), (np.int64, np.int64))
        out = words(self._run(key, compiled))
        out = out.reshape(count, *hwc(step.shape))
        return out.transpose(0, 3, 1, 2) if out.ndim == 4 else out

    def _in_pieces(self, operation: Operation, *vectors: np.ndarray) -> np.ndarray:
        """`operation` on two vectors of shares that this party writes."""
        parts = []
        for piece in pieces(vectors[0].size):
            size = piece.stop - piece.start
            for name, kind, vector in zip("xy", operation.operands, vectors, strict=True):
                self.runtime.set_var(name, replaced(self.like[kind], vector[piece], (size,), libspu.Share()))
            out = self._run((operation.kind, operation.takes, size), partial(self._sized, operation, size))
            parts.append(words(out, operation.stored))
        return np.concatenate(parts)

    def _sized(self, operation: Operation, size: int) -> Any:
        """The executable of `operation` on `size` words."""
        if operation not in self.codes:
            kinds = tuple(KINDS[kind][0] for kind in operation.operands)
            self.codes[operation] = compile_code(operation.function, PAIR, ("out",), kinds)
        return resized(self.codes[operation], START, size)

    def _template(self, function: Callable[..., Any]) -> Any:
        """A share that SPU made itself; its metadata is copied for shares that this party writes."""
        for name, owner in (("x", CLIENT), ("y", SERVER)):
            self._own(name, np.arange(START) if owner == self.rank else None, (START,), owner)
        compiled = partial(compile_code, lambda x, y: (function(x, y),), PAIR, ("out",), (np.int64, np.int64))
        return self._run(("template", function), compiled)

    def _run(self, key: tuple[Any, ...], compiled: Callable[[], Any]) -> Any:
        """This party's share of the result of an executable, which is `compiled` once for each `key`."""
        if key not in self.codes:
            self.codes[key] = compiled()
        begun = time.perf_counter()
        self.runtime.run(self.codes[key])
        self.runs.append((str(key[0]), str(key[1]), time.perf_counter() - begun))
        out = self.runtime.get_var("out")
        self.runtime.del_var("out")
        return out

    def _own(self, name: str, value: np.ndarray | None, shape: tuple[int, ...], owner: int) -> None:
        """Set a variable of ring words that `owner` knows; the other party's share of it is zero."""
        local = np.zeros(shape, np.int64) if value is None else np.ascontiguousarray(value, np.int64)
        self.runtime.set_var(name, self.io.make_shares(local, libspu.VIS_SECRET, owner)[self.rank])


class _Connection:
    """SPU's connection as that of the products of SEAL; counts the bytes of both directions."""

    def __init__(self, link: Any, peer: int) -> None:
        self.link, self.peer = link, peer
        self.sent = self.received = 0

    def send(self, data: bytes) -> None:
        self.link.send(self.peer, data)
        self.sent += len(data)

    def receive(self) -> bytes:
        data: bytes = self.link.recv(self.peer)
        self.received += len(data)
        return data


def _masked(step: Step, mask: Any, weight: Any) -> tuple[Any]:
    return (multiply(step, mask, weight),)


def resized(code: Any, old: int, new: int) -> Any:
    """An executable of SPU for vectors of `old` words, rewritten for vectors of `new` words.

    Its code is text, and the length is part of the types only. This takes microseconds, a compilation 35 ms.
    """
    changed = libspu.Executable()
    changed.ParseFromString(code.SerializeToString())
    changed.code = code.code.replace(b"tensor<%dx" % old, b"tensor<%dx" % new)
    return changed
