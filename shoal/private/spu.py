"""The only file that imports spu: a link, a runtime, and a Program run on them. The server is rank 0.

SPU 0.9.5, Cheetah, FM64. Weights are the server's own values, which halves the homomorphic work against shared ones.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from shoal.errors import ShoalError
from shoal.private.certs import TLS
from shoal.private.emit import Segment, function, segments, shape_nhwc, to_nhwc, weight_layout
from shoal.private.program import Program, Weights

SERVER, CLIENT = 0, 1
STATISTICS = re.compile(
    r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+), recv actions (\d+)"
)


def spu_version() -> str:
    """The installed SPU. Raises ShoalError where there is none."""
    try:
        return version("spu")
    except PackageNotFoundError as error:
        raise ShoalError(
            "found no SPU; need Python 3.10 or 3.11 and the private extra; pip install 'shoal[private]'"
        ) from error


@dataclass(frozen=True)
class Protocol:
    """What both parties must agree on before SPU connects."""

    protocol: str = "CHEETAH"
    field: str = "FM64"
    ot_kind: str = "YACL_Softspoken"
    """Softspoken starts at once and is faster on a LAN; YACL_Ferret sends about a ninth of the bytes a ReLU."""
    shared_weights: bool = False
    """Secret-share the weights instead of leaving them with the server: only to measure what that costs."""
    matmul_pack: bool = True


@dataclass(frozen=True)
class Statistics:
    """Seconds of one inference by kind, and what crossed the link in both directions."""

    relu_s: float
    linear_s: float
    bytes: int
    messages: int

    @property
    def seconds(self) -> float:
        """Seconds in all segments."""
        return self.relu_s + self.linear_s


class Engine:
    """One party's end of an SPU session that runs one program, over and over."""

    def __init__(
        self,
        program: Program,
        rank: int,
        addresses: tuple[str, str],
        tls: TLS | None,
        protocol: Protocol,
        log: Path,
        timeout_s: float,
    ) -> None:
        spu_version()
        self.program, self.rank, self.protocol, self.log = program, rank, protocol, log
        _start_log(log)
        self.link = _connect(rank, addresses, tls, timeout_s)
        self.runtime, self.io = _runtime(self.link, protocol, program.fraction_bits)
        self.segments = segments(program)
        self.compiled: dict[int, list[Any]] = {}

    def put_weights(self, weights: Weights | None) -> None:
        """Set every weight: the server passes its own, the client None and learns nothing but shapes."""
        for name, shape in _weight_shapes(self.program).items():
            value = None
            if weights is not None:
                words = weight_layout(name, weights.arrays[name])
                # Exact: compile keeps every word below 2^24.
                value = (words * 2.0**-self.program.fraction_bits).astype(np.float32)
            self._set(name, value, shape, SERVER)

    def _set(self, name: str, value: np.ndarray | None, shape: tuple[int, ...], owner: int) -> None:
        from spu import libspu

        mine = np.zeros(shape, np.float32) if value is None else value
        if owner == SERVER and self.protocol.shared_weights:
            self.runtime.set_var(name, self._share_out(mine, owner))
            return
        # The share of a value that the other party owns is a dummy, built here and never sent.
        shares = self.io.make_shares(mine, libspu.Visibility.VIS_SECRET, owner)
        self.runtime.set_var(name, shares[self.rank])

    def _share_out(self, value: np.ndarray, owner: int) -> Any:
        from spu import libspu

        if self.rank != owner:
            return _receive_share(self.link, owner)
        shares = self.io.make_shares(value, libspu.Visibility.VIS_SECRET)
        _send_share(self.link, 1 - owner, shares[1 - owner])
        return shares[owner]

    def prepare(self, batch: int) -> None:
        """Compile every segment for a batch size, once."""
        if batch not in self.compiled:
            shapes = _value_shapes(self.program, batch)
            self.compiled[batch] = [_compile(self.program, s, shapes) for s in self.segments]

    def run(self, images: np.ndarray | None, batch: int) -> tuple[tuple[np.ndarray, ...] | None, Statistics]:
        """One inference of `batch` images; the client passes them ([N, C, H, W] float32) and gets logits [N, classes].

        The server passes None and gets None. Logits are those of every exit, weak to strong.
        """
        self.prepare(batch)
        start = self.log.stat().st_size if self.log.exists() else 0
        shape = shape_nhwc(self.program.input_shape, batch)
        self._set(self.program.input, None if images is None else to_nhwc(images), shape, CLIENT)
        seconds = {"relu": 0.0, "linear": 0.0}
        for segment, executable in zip(self.segments, self.compiled[batch], strict=True):
            begun = time.perf_counter()
            self.runtime.run(executable)
            seconds[segment.kind] += time.perf_counter() - begun
        logits = self._open()
        return logits, Statistics(seconds["relu"], seconds["linear"], *self._traffic(start))

    def _open(self) -> tuple[np.ndarray, ...] | None:
        """The server sends its shares of the logits; the client alone puts them together."""
        shares = [self.runtime.get_var(name) for name in self.program.outputs]
        if self.rank == SERVER:
            for share in shares:
                _send_share(self.link, CLIENT, share)
            return None
        theirs = [_receive_share(self.link, SERVER) for _ in shares]
        return tuple(np.asarray(self.io.reconstruct([a, b]), np.float64) for a, b in zip(theirs, shares, strict=True))

    def _traffic(self, start: int) -> tuple[int, int]:
        """(bytes, messages) in both directions since the log had `start` bytes; SPU tells them nowhere else."""
        with self.log.open("rb") as file:
            file.seek(start)
            found = STATISTICS.findall(file.read().decode(errors="replace"))
        if len(found) != len(self.segments):
            raise ShoalError(f"found {len(found)} statistics in SPU's log; need {len(self.segments)}, one a segment")
        rows = np.array(found, dtype=np.int64).sum(0)
        return int(rows[0] + rows[1]), int(rows[2] + rows[3])

    def close(self) -> None:
        """End the link."""
        self.link.stop_link()


def _start_log(path: Path) -> None:
    from spu import libspu

    options = libspu.logging.LogOptions()
    options.enable_console_logger = False
    options.system_log_path = str(path)
    options.trace_log_path = str(path.with_name("trace.log"))
    libspu.logging.setup_logging(options)


def _connect(rank: int, addresses: tuple[str, str], tls: TLS | None, timeout_s: float) -> Any:
    from spu import libspu

    desc = libspu.link.Desc()
    for name, address in zip(("server", "client"), addresses, strict=True):
        desc.add_party(name, address)
    desc.recv_timeout_ms = desc.http_timeout_ms = int(timeout_s * 1000)
    desc.connect_retry_interval_ms = 100
    desc.connect_retry_times = max(10, int(min(timeout_s, 60) * 10))
    if tls is not None:
        desc.enable_ssl = True
        for options in (desc.client_ssl_opts, desc.server_ssl_opts):
            options.cert.certificate_path, options.cert.private_key_path = str(tls.cert), str(tls.key)
            options.verify.verify_depth, options.verify.ca_file_path = 1, str(tls.ca)
    return libspu.link.create_brpc(desc, rank)


def _runtime(link: Any, protocol: Protocol, fraction_bits: int) -> tuple[Any, Any]:
    import spu
    from spu import libspu

    config = libspu.RuntimeConfig()
    # JSON, because the 0.9.5 wheel does not export the enumeration of OT kinds.
    body = {
        "protocol": protocol.protocol,
        "field": protocol.field,
        "fxp_fraction_bits": fraction_bits,
        "cheetah_2pc_config": {"ot_kind": protocol.ot_kind, "disable_matmul_pack": not protocol.matmul_pack},
        "enable_pphlo_profile": True,
        "experimental_enable_colocated_optimization": not protocol.shared_weights,
        "max_concurrency": min(8, os.cpu_count() or 1),
    }
    config.ParseFromJsonString(json.dumps(body))
    return spu.Runtime(link, config), spu.Io(2, config)


def _send_share(link: Any, to: int, share: Any) -> None:
    link.send(to, json.dumps(len(share.share_chunks)).encode())
    for part in (share.meta, *share.share_chunks):
        link.send(to, part)


def _receive_share(link: Any, source: int) -> Any:
    from spu import libspu

    count = int(json.loads(link.recv(source)))
    share = libspu.Share()
    share.meta = link.recv(source)
    share.share_chunks = [link.recv(source) for _ in range(count)]
    return share


def _weight_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights as emitted, from the public program alone."""
    shapes = {program.input: program.input_shape} | {step.name: step.shape for step in program.steps}
    found: dict[str, tuple[int, ...]] = {}
    for step in program.steps:
        if step.op == "conv2d":
            channels = shapes[step.inputs[0]][0] // step.attrs["groups"]
            found[f"{step.name}.weight"] = (*step.attrs["kernel"], channels, step.shape[0])
        elif step.op == "linear":
            found[f"{step.name}.weight"] = (shapes[step.inputs[0]][-1], step.shape[0])
        if step.op in ("conv2d", "linear"):
            found[f"{step.name}.bias"] = (step.shape[0],)
    return found


def _value_shapes(program: Program, batch: int) -> dict[str, tuple[int, ...]]:
    values = {program.input: program.input_shape} | {step.name: step.shape for step in program.steps}
    return {name: shape_nhwc(shape, batch) for name, shape in values.items()} | _weight_shapes(program)


def _compile(program: Program, segment: Segment, shapes: dict[str, tuple[int, ...]]) -> Any:
    from spu import libspu
    from spu.utils import frontend

    names = [*segment.inputs, *segment.weights]
    examples = [np.zeros(shapes[name], np.float32) for name in names]
    secret = [libspu.Visibility.VIS_SECRET] * len(names)
    executable, _ = frontend.compile(
        frontend.Kind.JAX, function(program, segment), examples, {}, names, secret, lambda out: list(segment.outputs)
    )
    return executable


def describe(protocol: Protocol) -> dict[str, Any]:
    """The protocol's fields, for the handshake."""
    return asdict(protocol)
