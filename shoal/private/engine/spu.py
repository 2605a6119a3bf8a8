"""Runs a Program inside SPU. Only this file and `maker` import spu; both run in worker processes.

Values are in (H, W, C) order here, see `shoal.private.engine.segments`.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shoal.errors import ShoalError
from shoal.private.engine.segments import (
    Segment,
    channels_last,
    flat_positions,
    hwc,
    in_spu_order,
    parameter_shapes,
    split,
)
from shoal.private.engine.shares import replaced, words
from shoal.private.program.program import Program
from shoal.private.program.steps import Step
from shoal.private.transport.tunnel import SPU_SOCKET, TUNNEL_SOCKET

try:
    import jax
    import jax.numpy as jnp
    import spu
    from spu import libspu
    from spu.utils import frontend

    from shoal.private.engine.emit import EMIT, tile
except ImportError as _error:
    raise ShoalError(
        f"found no SPU ({_error}); need Python 3.10 or 3.11 with the private extra; do pip install shoal[private]"
    ) from _error

SERVER, CLIENT = 0, 1  # SPU sends four fifths of a ReLU's bytes from rank 0, and servers have the better uplink.
KEPT, POSITIVE = "relu.kept", "relu.positive"  # variables of every masked ReLU in turn
FIELDS = {32: "FM32", 64: "FM64", 128: "FM128"}


@dataclass(frozen=True)
class Settings:
    """What both parties must agree on, and how this party works: how many seconds it waits for messages and for the
    connection, and the workers and the weight cache of SEAL's products."""

    field_bits: int
    fraction_bits: int
    ot_kind: str
    shared_weights: bool
    threads: int
    timeout_s: float
    link_s: float
    products: str = "spu"
    workers: str = "1"
    cache_bytes: int = 0

    def runtime_config(self) -> Any:
        """SPU's own configuration."""
        # SPU's wheel does not export the enumeration of OT kinds, so only JSON can set it.
        fields = {
            "protocol": "CHEETAH",
            "field": FIELDS[self.field_bits],
            "fxp_fraction_bits": self.fraction_bits,
            "max_concurrency": self.threads,
            "cheetah_2pc_config": {"ot_kind": self.ot_kind},
            "experimental_enable_colocated_optimization": not self.shared_weights,
            "enable_pphlo_profile": True,
        }
        config = libspu.RuntimeConfig()
        config.ParseFromJsonString(json.dumps(fields))
        return config


def open_link(rank: int, folder: Path, session: str, settings: Settings) -> Any:
    """SPU's connection. It listens and connects on Unix sockets in `folder`; the parent carries it to the peer."""
    desc = libspu.link.Desc()
    desc.id = session
    for party, name in ((SERVER, "server"), (CLIENT, "client")):
        desc.add_party(name, f"unix:{folder / (SPU_SOCKET if party == rank else TUNNEL_SOCKET)}")
    desc.recv_timeout_ms = int(settings.timeout_s * 1000)
    desc.http_timeout_ms = int(min(settings.timeout_s, 120.0) * 1000)
    desc.connect_retry_interval_ms = 250
    desc.connect_retry_times = max(1, int(settings.link_s / 0.25))
    return libspu.link.create_brpc(desc, rank)


@dataclass
class Tally:
    """What one query cost this party: seconds by kind, bytes each way, messages both ways."""

    relu_s: float = 0.0
    linear_s: float = 0.0
    sent: int = 0
    received: int = 0
    messages: int = 0


class LinkLog:
    """Bytes and messages of SPU's connection, read from its log: SPU offers no other way.

    The log belongs to the process, so a process can serve only one session.
    """

    LINE = re.compile(r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+), recv actions (\d+)")

    def __init__(self, folder: Path) -> None:
        options = libspu.logging.LogOptions()
        options.enable_console_logger = False
        options.system_log_path = str(folder / "spu.log")
        options.trace_log_path = str(folder / "trace.log")
        # Rotation could move lines away before they are read; an hour of queries writes a few MB.
        options.max_log_file_size = 1 << 30
        libspu.logging.setup_logging(options)
        self.path, self.offset, self.lines = folder / "spu.log", 0, 0

    def read(self) -> list[tuple[int, int, int, int]]:
        """New lines as (sent bytes, received bytes, messages sent, messages received)."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        found = [tuple(map(int, m)) for m in self.LINE.findall(whole.decode(errors="replace"))]
        return [(a, b, c, d) for a, b, c, d in found]


class Executor:
    """Runs one program on one SPU runtime, at one party. `rank` is SERVER or CLIENT."""

    def __init__(self, program: Program, link: Any, rank: int, settings: Settings, log: LinkLog) -> None:
        self.program, self.link, self.rank, self.settings, self.log = program, link, rank, settings, log
        config = settings.runtime_config()
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
        if not self.settings.shared_weights:
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


def compile_code(
    function: Callable[..., Any], shapes: dict[str, tuple[int, ...]], outputs: tuple[str, ...], kinds: Any = np.float32
) -> Any:
    """SPU's executable of `function` over secret variables of `shapes`; `kinds` is one type, or a tuple of them."""

    def segment(*values: Any) -> Any:
        return function(*values)

    each = kinds if isinstance(kinds, tuple) else (kinds,) * len(shapes)
    arguments = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes.values(), each, strict=True)]
    secret = [libspu.VIS_SECRET] * len(shapes)
    kind = frontend.Kind.JAX
    code, _ = frontend.compile(kind, segment, arguments, {}, list(shapes), secret, lambda _: list(outputs))
    return code
