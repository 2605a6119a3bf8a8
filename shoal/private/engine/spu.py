"""SPU itself: its settings, its connection, its log and its compiler. Only worker processes import this file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.errors import ShoalError
from shoal.private.transport.tunnel import SPU_SOCKET, TUNNEL_SOCKET

try:
    import jax
    from spu import libspu
    from spu.utils import frontend
except ImportError as _error:
    raise ShoalError(
        f"found no SPU ({_error}); need Python 3.10 or 3.11 with the private extra; do pip install shoal[private]"
    ) from _error

SERVER, CLIENT = 0, 1
FIELDS = {32: "FM32", 64: "FM64", 128: "FM128"}


@dataclass(frozen=True)
class Settings:
    """What both parties must agree on, and how this party works: how many seconds it waits for messages and for the
    connection, and the workers and the weight cache of SEAL's products."""

    field_bits: int
    fraction_bits: int
    ot_kind: str
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
            "experimental_enable_colocated_optimization": True,
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
        self.path, self.offset = folder / "spu.log", 0

    def read(self) -> list[tuple[int, int, int, int]]:
        """New lines as (sent bytes, received bytes, messages sent, messages received)."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        found = [tuple(map(int, m)) for m in self.LINE.findall(whole.decode(errors="replace"))]
        return [(a, b, c, d) for a, b, c, d in found]


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
