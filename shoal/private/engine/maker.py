"""SPU as the engine of the offline phase: exact ring products, and products of shares that the parties write.

A party writes its own random words as its share of a value (`shares.replaced`), SPU multiplies, and the party reads its
share of the result. No value is opened. This runs in a worker process, as `Executor` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import spu
from spu import libspu

from shoal.private.engine.emit import EMIT
from shoal.private.engine.segments import channels_last, hwc, in_spu_order, parameter_shapes
from shoal.private.engine.shares import ADDITIVE, BOOLEAN, replaced, words
from shoal.private.engine.spu import CLIENT, SERVER, Settings, compile_code
from shoal.private.products.exchange import MaskSender, Multiplier, packed_steps, plain_bits
from shoal.private.program.program import Program
from shoal.private.program.steps import Step
from shoal.private.protocol.offline import Masks

# Ring words are int64. The flag applies to the whole process, which does nothing else.
jax.config.update("jax_enable_x64", True)

PIECES = tuple(1 << bits for bits in (17, 14, 11, 8, 5))
"""Lengths that a vector is split into. Each length needs an executable; these few suffice for all vectors."""
START = 8
KINDS: dict[str, tuple[type, Callable[[Any, Any], Any]]] = {
    "word": (np.int64, lambda x, y: x & y),
    "bit": (np.bool_, lambda x, y: x < y),
    "sum": (np.int64, lambda x, y: x + y),
}
"""Of each kind of share, its type, and an operation on two private words whose result is such a share."""


class SpuEngine:
    """One party's `Engine` for `program`. `arrays` holds the server's int64 weights; it is None at the client."""

    def __init__(
        self, program: Program, link: Any, rank: int, settings: Settings, arrays: dict[str, np.ndarray] | None
    ) -> None:
        config = settings.runtime_config()
        self.rank, self.runtime, self.io = rank, spu.Runtime(link, config), spu.Io(2, config)
        self.shapes = {program.input: program.input_shape} | {s.name: s.shape for s in program.steps}
        self.kernels = {k: v for k, v in parameter_shapes(program).items() if k.endswith(".weight")}
        self.codes: dict[tuple[Any, ...], Any] = {}
        self.runs: list[tuple[str, str, float]] = []
        """Of each run of SPU, in order: its kind, its step (or length), and its seconds."""
        self.link, self.program = link, program
        linear = tuple(step for step in program.steps if f"{step.name}.weight" in self.kernels)
        self.packings = packed_steps(program, linear) if settings.products == "seal" else {}
        self.weights = {} if arrays is None else {s.name: arrays[f"{s.name}.weight"] for s in linear}
        self.sealed: list[tuple[str, float, int, int]] = []
        """Of each product of SEAL: its step, its seconds, and the bytes that this party sent and received."""
        for name, shape in self.kernels.items():
            if name.removesuffix(".weight") in self.packings:
                continue
            self._own(name, None if arrays is None else in_spu_order(arrays[name]), shape, SERVER)
        self.like = {kind: self._template(function) for kind, (_, function) in KINDS.items()}

    def ands(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """See Engine. SPU's AND of boolean shares takes 0.06 us and 0.25 bytes each way per bit."""
        return self._in_pieces("and", lambda x, y: (x & y,), (("word", a), ("word", b)), BOOLEAN)

    def chosen(self, bits: np.ndarray, words: np.ndarray) -> np.ndarray:
        """See Engine. SPU's product of a boolean and an arithmetic share takes about 1 us and 8.1 bytes each way."""
        return self._in_pieces("chosen", lambda x, y: (jnp.where(x, y, 0),), (("bit", bits), ("sum", words)), ADDITIVE)

    def products(self, steps: Sequence[Step], masks: Masks | None, count: int) -> Iterator[tuple[Step, np.ndarray]]:
        """See Engine. Steps that have a packing are multiplied by SEAL, if the settings ask for it, others by SPU."""
        packed = [step for step in steps if step.name in self.packings]
        if packed:
            yield from self._sealed(packed, masks, count)
        for step in (s for s in steps if s.name not in self.packings):
            yield step, self._product(step, None if masks is None else masks(step), count)

    def _sealed(self, steps: Sequence[Step], masks: Masks | None, count: int) -> Iterator[tuple[Step, np.ndarray]]:
        """The products of SEAL, over SPU's connection."""
        connection, bits = _Connection(self.link, 1 - self.rank), plain_bits(self.program, steps)
        begun = time.perf_counter()
        if masks is None:
            made = Multiplier(connection, self.packings, bits, self.weights).products(steps, count)
        else:
            made = MaskSender(connection, self.packings, bits).products(steps, masks, count)
        for step, shares in made:
            self.sealed.append((step.name, time.perf_counter() - begun, connection.sent, connection.received))
            connection.sent = connection.received = 0
            begun = time.perf_counter()
            yield step, shares

    def _product(self, step: Step, masks: np.ndarray | None, count: int) -> np.ndarray:
        """Shares of one step's product by SPU; the `count` inferences share its ciphertexts."""
        shape, name = (count, *hwc(self.shapes[step.inputs[0]])), f"{step.name}.weight"
        axes = (0, *channels_last(len(shape) - 1))
        self._own("mask", None if masks is None else masks.view(np.int64).transpose(axes), shape, CLIENT)
        key, shapes = ("product", step.name, count), {"mask": shape, name: self.kernels[name]}
        out = words(self._run(key, partial(_masked, step), shapes, (np.int64, np.int64)))
        out = out.reshape(count, *hwc(step.shape))
        return out.transpose(0, 3, 1, 2) if out.ndim == 4 else out

    def _in_pieces(
        self, key: str, function: Callable[..., Any], operands: tuple[tuple[str, np.ndarray], ...], stored: bytes
    ) -> np.ndarray:
        """`function` of two vectors of shares that this party writes."""
        kinds, vectors = tuple(KINDS[kind][0] for kind, _ in operands), [v for _, v in operands]
        parts = []
        for start, size, used in _pieces(vectors[0].size):
            for name, (kind, vector) in zip("xy", operands, strict=True):
                piece = np.zeros(size, np.uint64)
                piece[:used] = vector[start : start + used]
                self.runtime.set_var(name, replaced(self.like[kind], piece, (size,), libspu.Share()))
            shapes: dict[str, tuple[int, ...]] = {"x": (size,), "y": (size,)}
            out = self._run((key, size), function, shapes, kinds)
            parts.append(words(out, stored)[:used])
        return np.concatenate(parts)

    def _template(self, function: Callable[..., Any]) -> Any:
        """A share that SPU made itself; its metadata is copied for shares that this party writes."""
        for name, owner in (("x", CLIENT), ("y", SERVER)):
            self._own(name, np.arange(START) if owner == self.rank else None, (START,), owner)
        shapes: dict[str, tuple[int, ...]] = {"x": (START,), "y": (START,)}
        return self._run(("template", function), lambda x, y: (function(x, y),), shapes, (np.int64, np.int64))

    def _run(
        self, key: tuple[Any, ...], function: Callable[..., Any], shapes: dict[str, tuple[int, ...]], kinds: Any
    ) -> Any:
        """This party's share of `function` of the variables in `shapes`; it is compiled once for each `key`."""
        if key not in self.codes:
            self.codes[key] = compile_code(function, shapes, ("out",), kinds)
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
    return (EMIT[step.op](step, mask, weight, jnp.zeros((), jnp.int64)),)


def _pieces(length: int) -> Iterator[tuple[int, int, int]]:
    """(start, length of the piece, used part of it): the largest pieces that fit; the last one is padded."""
    start = 0
    while start < length:
        size = next((p for p in PIECES if p <= length - start), PIECES[-1])
        used = min(size, length - start)
        yield start, size, used
        start += used
