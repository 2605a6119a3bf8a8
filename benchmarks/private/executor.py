"""Runs a whole Program inside SPU: the yardstick for shoal's offline and online phases together.

Values are in (H, W, C) order here, see `shoal.private.engine.shapes`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import spu
from spu import libspu

from benchmarks.private.operations import EMIT, tile
from benchmarks.private.segments import Segment, flat_positions, split
from shoal.errors import ShoalError
from shoal.private.engine.shapes import channels_last, hwc, in_spu_order, parameter_shapes
from shoal.private.engine.shares import replaced, words
from shoal.private.engine.spu import CLIENT, SERVER, LinkLog, Settings, compile_code
from shoal.private.program.program import Program
from shoal.private.program.steps import Step

KEPT, POSITIVE = "relu.kept", "relu.positive"  # variables of every masked ReLU in turn


@dataclass
class Tally:
    """What one query cost this party: seconds by kind, bytes each way, messages both ways."""

    relu_s: float = 0.0
    linear_s: float = 0.0
    sent: int = 0
    received: int = 0
    messages: int = 0


class Executor:
    """Runs one program on one SPU runtime, at one party. `rank` is SERVER or CLIENT.

    With `shared`, the weights are secret-shared with the client, which doubles the work; else the server keeps them.
    """

    def __init__(
        self, program: Program, link: Any, rank: int, settings: Settings, log: LinkLog, *, shared: bool = False
    ) -> None:
        self.program, self.link, self.rank, self.settings, self.log = program, link, rank, settings, log
        self.shared, config = shared, settings.runtime_config()
        config.experimental_enable_colocated_optimization = not shared
        self.runtime, self.io = spu.Runtime(link, config), spu.Io(2, config)
        self.segments = split(program)
        self.shapes = {program.input: program.input_shape} | {s.name: s.shape for s in program.steps}
        self.parameter_shapes = parameter_shapes(program)
        self.keep = {s.name: flat_positions(program, s) for s in program.steps if s.op == "relu"}
        self.compiled: dict[tuple[int, int], Any] = {}

    def set_weights(self, arrays: dict[str, np.ndarray] | None) -> None:
        """Give SPU the server's int64 `arrays` (None at the client). All queries use them."""
        for name, shape in self.parameter_shapes.items():
            value = None
            if arrays is not None:
                value = in_spu_order(arrays[name]).astype(np.float32) * np.float32(2.0**-self.settings.fraction_bits)
            self._own(name, value, shape, SERVER)

    def prepare(self, batch: int) -> None:
        """Compile every segment for `batch` images, unless that is done already."""
        for index in range(len(self.segments)):
            self._executable(index, batch)

    def warm_up(self) -> None:
        """Run a small product and ReLU, which makes the keys and the first oblivious transfers."""
        # With more than 2048 values in each thread, SPU opens every OT instance that it will use.
        rows = 64 * max(1, self.settings.threads) + 16
        shapes: dict[str, tuple[int, ...]] = {"warm.x": (rows, 32), "warm.w": (32, 32)}
        for (name, shape), owner in zip(shapes.items(), (CLIENT, SERVER), strict=True):
            self._own(name, np.zeros(shape, np.float32) if owner == self.rank else None, shape, owner)
        code = compile_code(lambda x, w: (jnp.maximum(x @ w, 0.0),), shapes, ("warm.y",))
        self.runtime.run(code)
        for name in ("warm.x", "warm.w", "warm.y"):
            self.runtime.del_var(name)
        self.log.read()

    def query(self, batch: int, images: np.ndarray | None) -> tuple[list[np.ndarray], Tally]:
        """Logits of all outputs (none at the server) for `images` float32 [batch, C, H, W] (there None), and cost."""
        self.prepare(batch)
        tally = Tally()
        value = None if images is None else np.ascontiguousarray(images.transpose(0, *channels_last(images.ndim - 1)))
        self._own(self.program.input, value, (batch, *hwc(self.program.input_shape)), CLIENT)
        live = {self.program.input}
        for index, segment in enumerate(self.segments):
            started = time.perf_counter()
            self._run(index, batch)
            spent = time.perf_counter() - started
            if segment.kind == "relu":
                tally.relu_s += spent
            else:
                tally.linear_s += spent
            live |= set(segment.outputs)
            live -= self._drop_dead(index, live)
        logits = [self._reveal(name, tally) for name in self.program.outputs]
        for name in live:
            self.runtime.del_var(name)
        self._account(tally)
        return [a for a in logits if a is not None], tally

    def _run(self, index: int, batch: int) -> None:
        """Run one segment. For a masked ReLU, only the kept values go through SPU; the others stay unchanged."""
        code, step = self._executable(index, batch), self.segments[index].steps[0]
        if not self._is_masked(step):
            self.runtime.run(code)
            return
        whole = self.runtime.get_var(step.inputs[0])
        flat, chosen = words(whole), self._chosen(step, batch)
        self.runtime.set_var(KEPT, replaced(whole, flat[chosen], chosen.shape, libspu.Share()))
        self.runtime.run(code)
        flat[chosen] = words(self.runtime.get_var(POSITIVE))
        self.runtime.set_var(step.name, replaced(whole, flat, (batch, *hwc(step.shape)), libspu.Share()))

    def _is_masked(self, step: Step) -> bool:
        # The image is not held as additive shares, so a ReLU that reads it directly runs inside SPU as a whole.
        return step.op == "relu" and self.keep[step.name] is not None and step.inputs[0] != self.program.input

    def _chosen(self, step: Step, batch: int) -> np.ndarray:
        kept = self.keep[step.name]
        assert kept is not None
        return tile(kept, batch, math.prod(step.shape))

    def _drop_dead(self, index: int, live: set[str]) -> set[str]:
        later = {name for s in self.segments[index + 1 :] for name in s.inputs} | set(self.program.outputs)
        for name in live - later:
            self.runtime.del_var(name)
        return live - later

    def _account(self, tally: Tally) -> None:
        lines = self.log.read()
        if len(lines) != len(self.segments):
            raise ShoalError(
                f"found {len(lines)} profile lines for {len(self.segments)} segments in SPU's log; need one each; "
                "use one session a process and leave SPU's logging alone"
            )
        for sent, received, sends, receives in lines:
            tally.sent += sent
            tally.received += received
            tally.messages += sends + receives

    def _own(self, name: str, value: np.ndarray | None, shape: tuple[int, ...], owner: int) -> None:
        """Set a variable that `owner` knows; `value` is None at the other party, which learns only the shape."""
        if not self.shared:
            # For a value that one party owns, the other party's share is zero, so nothing is sent.
            local = np.zeros(shape, np.float32) if value is None else value
            self.runtime.set_var(name, self.io.make_shares(local, libspu.VIS_SECRET, owner)[self.rank])
        elif value is not None:
            shares = self.io.make_shares(value, libspu.VIS_SECRET)
            self.runtime.set_var(name, shares[self.rank])
            self._send(shares[1 - self.rank])
        else:
            self.runtime.set_var(name, self._receive())

    def _send(self, share: Any) -> int:
        pieces = [share.meta, *share.share_chunks]
        self.link.send(1 - self.rank, len(pieces).to_bytes(4, "big"))
        for piece in pieces:
            self.link.send(1 - self.rank, piece)
        return 4 + sum(map(len, pieces))

    def _receive(self) -> Any:
        count = int.from_bytes(self.link.recv(1 - self.rank), "big")
        pieces = [self.link.recv(1 - self.rank) for _ in range(count)]
        share = libspu.Share()
        share.meta, share.share_chunks = pieces[0], pieces[1:]
        return share

    def _reveal(self, name: str, tally: Tally) -> np.ndarray | None:
        """At the client the value, from both shares; None at the server, which receives nothing."""
        mine = self.runtime.get_var(name)
        if self.rank == SERVER:
            tally.sent += self._send(mine)
            tally.messages += 2 + len(mine.share_chunks)
            return None
        theirs = self._receive()
        tally.received += 4 + len(theirs.meta) + sum(map(len, theirs.share_chunks))
        tally.messages += 2 + len(theirs.share_chunks)
        value = np.asarray(self.io.reconstruct([theirs, mine]), np.float64)
        return value.transpose(0, 3, 1, 2) if value.ndim == 4 else value

    def _executable(self, index: int, batch: int) -> Any:
        if (index, batch) not in self.compiled:
            segment = self.segments[index]
            if self._is_masked(segment.steps[0]):
                size = len(self._chosen(segment.steps[0], batch))
                self.compiled[index, batch] = compile_code(
                    lambda x: (jnp.maximum(x, 0.0),), {KEPT: (size,)}, (POSITIVE,)
                )
                return self.compiled[index, batch]
            shapes = {name: (batch, *hwc(self.shapes[name])) for name in segment.inputs}
            shapes |= {name: self.parameter_shapes[name] for name in segment.parameters}
            emit = partial(self._emit, segment, tuple(shapes))
            self.compiled[index, batch] = compile_code(emit, shapes, segment.outputs)
        return self.compiled[index, batch]

    def _emit(self, segment: Segment, names: tuple[str, ...], *values: Any) -> tuple[Any, ...]:
        env = dict(zip(names, values, strict=True))
        scale = 2**self.settings.fraction_bits
        for step in segment.steps:
            inputs = [env[name] for name in step.inputs]
            parts = [env[f"{step.name}.{p}"] for p in ("weight", "bias") if step.op in ("conv2d", "linear")]
            extra = [self.keep[step.name]] if step.op == "relu" else []
            extra += [scale] if step.op in ("avg_pool2d", "mean") else []
            env[step.name] = EMIT[step.op](step, *inputs, *parts, *extra)
        return tuple(env[name] for name in segment.outputs)
